"use strict";

// The columns of the page. A route is {expert, latent, token, search}, as in the address.

function address(route) {
  if (route.search !== undefined) return `#search=${encodeURIComponent(route.search)}`;
  const parts = [route.expert, route.latent, route.token].map((part) => part ?? "");
  return `#${parts.join("/").replace(/\/+$/, "")}`;
}

function expertLink(corpus, expert) {
  return element("a", { href: address({ expert }) }, swatch(expert), `${expert}`);
}

function latentLink(corpus, row) {
  const expert = corpus.expert(row), latent = corpus.alive[row];
  return element("a", { href: address({ expert, latent }) },
    corpus.isMixture ? swatch(expert) : null, `${latent}`);
}

function topTokenChips(corpus, row, most = 3) {
  return element("span", {}, corpus.topTokens(row).slice(0, most).map((id) => chip(corpus.facts.strings[id])));
}

/*
 * Tokens around one, coloured by a latent's activations, as links to all that fires on them. Tab
 * stops at the middle one only; arrow keys move along.
 */
function passage(corpus, token, row, route, { before = 14, after = 10, label = "" } = {}) {
  const index = corpus.passageOf(token);
  const first = Math.max(corpus.passages[index], token - before);
  const last = Math.min(corpus.passages[index + 1], token + after + 1);
  const words = [];
  for (let t = first; t < last; t++) {
    let strength = 0;
    if (row !== null) {
      for (let i = corpus.firings[t]; i < corpus.firings[t + 1]; i++) {
        if (corpus.latents[i] === row) strength = corpus.strengths[i] / corpus.facts.steps;
      }
    }
    const share = Math.round(100 * Math.abs(strength));
    const classes = [
      t === token && row !== null && "peak", corpus.excluded[corpus.tokens[t]] && "excluded",
    ].filter(Boolean).join(" ");
    const activation = strength ? number(strength * corpus.largest[row]) : null;
    words.push(element("a", {
      href: address({ ...route, token: t }),
      class: classes || null,
      tabindex: t === token ? 0 : -1,
      title: activation,
      "aria-label": [spoken(corpus.text(t)), activation && `activation ${activation}`].filter(Boolean).join(", "),
      style: share ? `background:color-mix(in srgb, var(--${strength < 0 ? "opposes" : "fires"}) ${share}%, transparent)` : null,
    }, visible(corpus.text(t))));
  }
  return element("div", { class: "passage" },
    element("span", { class: "number" }, label), element("span", { class: "text" }, words));
}

function passages(corpus, title, tokens, row, route, labels) {
  if (!tokens.length) return null;
  return element("div", {}, heading(3, title),
    tokens.map((token, i) => passage(corpus, token, row, route, { label: labels?.[i] })));
}

function cosine(value) {
  return value === null ? "–" : value.toFixed(2);
}

const EXPERT_ORDERS = {
  use: (corpus) => (x) => -corpus.use[x],
  number: () => (x) => x,
  "live latents": (corpus) => (x) => -corpus.rowsOf[x].length,
  omega: (corpus) => (x) => -(corpus.facts.omega?.[x] ?? 0),
  "cosine within": (corpus) => (x) => -(corpus.redundancy(x).within ?? -1),
  "cosine between": (corpus) => (x) => -(corpus.redundancy(x).between ?? -1),
};

// A table of experts; another order replaces the rows, and leaves the control its focus.
function expertsView(corpus, state) {
  const { num_experts: n, num_shared_experts: shared, omega } = corpus.facts;
  const most = Math.max(1, ...corpus.use.subarray(shared));
  const idle = corpus.use.filter((count) => !count).length;
  const orders = Object.keys(EXPERT_ORDERS).filter((name) => omega || name !== "omega");
  const box = element("div");
  const draw = () => {
    const key = EXPERT_ORDERS[state.expertOrder](corpus);
    const keys = Array.from({ length: n }, (_, x) => key(x));
    const order = [...keys.keys()].sort((a, b) => keys[a] - keys[b] || a - b);
    const columns = {
      omega: (x) => omega[x].toFixed(3),
      "cosine within": (x) => cosine(corpus.redundancy(x).within),
      "cosine between": (x) => cosine(corpus.redundancy(x).between),
    };
    const name = state.expertOrder in columns ? state.expertOrder : "live";
    const shown = columns[name] ?? ((x) => `${corpus.rowsOf[x].length}`);
    const made = table(["expert", "use", { number: "tokens" }, { number: name }], order.map((x) => [
      expertLink(corpus, x),
      element("div", { class: "bar", style: `width:${60 * Math.min(1, corpus.use[x] / most)}px;background:${color(x)}` }),
      { number: x < shared ? "shared" : corpus.use[x] ? percent(corpus.use[x] / corpus.numCounted) : "idle" },
      { number: shown(x) },
    ]));
    markCurrent(made, order.indexOf(state.expert));
    box.replaceChildren(made);
  };
  draw();
  return element("div", {}, heading(2, "Experts"),
    element("p", { class: "dim" }, `${n} experts, ${shared} shared by all tokens, ${idle} idle here`),
    element("div", { class: "controls" }, select("expert-order", "sort by", orders, state.expertOrder, (value) => {
      state.expertOrder = value;
      draw();
    })), box);
}

const LATENT_ORDERS = {
  density: (corpus) => (row) => -corpus.numFirings[row],
  "given expert": (corpus) => (row) => -corpus.numFirings[row] / Math.max(1, corpus.use[corpus.expert(row)]),
  maximum: (corpus) => (row) => -corpus.maximum[row],
  "nearest cosine": (corpus) => (row) => -Math.max(corpus.within[row], corpus.between[row]),
  number: () => (row) => row,
};

// A table of latents, sorted and filtered by a token that fires them or by their explanation; the
// controls stay, and keep their focus.
function latentTable(corpus, rows, state) {
  const count = element("p", { class: "dim", "aria-live": "polite" }), box = element("div");
  const draw = () => {
    const wanted = state.filter.trim().toLowerCase();
    const matches = (row) => corpus.topTokens(row).some((id) => corpus.names[id].includes(wanted)) ||
      (corpus.facts.explanations[corpus.alive[row]]?.text.toLowerCase().includes(wanted) ?? false);
    const kept = wanted ? rows.filter(matches) : rows.slice();
    if (state.latentOrder !== "as found") {
      const key = LATENT_ORDERS[state.latentOrder](corpus);
      kept.sort((a, b) => key(a) - key(b) || a - b);
    }
    count.textContent = rows.length ? `${kept.length} of ${rows.length} latents` :
      "Nothing: no token of this text, no such latent that fires here, no explanation with it.";
    box.replaceChildren(inPortions(kept, 200, (part) => {
      const made = table(["latent", { number: "density" }, { number: "max" }, "fires on"],
        part.map((row) => [latentLink(corpus, row),
          { number: percent(corpus.numFirings[row] / corpus.numCounted) },
          { number: number(corpus.maximum[row]) }, topTokenChips(corpus, row)]));
      markCurrent(made, part.findIndex((row) => corpus.alive[row] === state.latent));
      return made;
    }));
  };
  const orders = Object.keys(LATENT_ORDERS);
  const filter = element("input", {
    id: "latent-filter", type: "search", value: state.filter, "aria-label": "Filter by token or explanation",
    input: (event) => { state.filter = event.target.value; draw(); },
  });
  draw();
  return element("div", {},
    element("div", { class: "controls" },
      select("latent-order", "sort by", state.found ? ["as found", ...orders] : orders, state.latentOrder, (value) => {
        state.latentOrder = value;
        draw();
      }),
      element("label", {}, "filter ", filter)),
    count, box);
}

function expertView(corpus, x, state) {
  const { facts } = corpus, rows = corpus.rowsOf[x];
  const latents = latentTable(corpus, rows, state);
  if (!corpus.isMixture) return element("div", {}, heading(2, "Latents"), latents);
  const counts = new Map(), gates = [];
  for (let t = corpus.firstCounted; t < corpus.tokens.length; t++) {
    const gate = corpus.isCounted(t) ? corpus.gate(t, x) : null;
    if (gate === null) continue;
    counts.set(corpus.tokens[t], (counts.get(corpus.tokens[t]) ?? 0) + 1);
    gates.push(gate);
  }
  const n = facts.num_experts, partners = [];
  for (let y = 0; y < n; y++) {
    const together = corpus.pairs()[x * n + y];
    if (y !== x && y >= facts.num_shared_experts && together) partners.push([y, together]);
  }
  const redundancy = corpus.redundancy(x), largestGate = gates.reduce((a, b) => Math.max(a, b), 0);
  return element("div", {},
    heading(2, swatch(x), `Expert ${x}`),
    element("p", { class: "dim" },
      `${x < facts.num_shared_experts ? "shared by all tokens" : `selected by ${percent(gates.length / corpus.numCounted)} of tokens`}, ` +
      `${rows.length} of ${corpus.size} latents fire here`,
      facts.omega ? `, omega ${facts.omega[x].toFixed(3)}` : "",
      `, mean largest cosine ${cosine(redundancy.within)} within, ${cosine(redundancy.between)} with others`),
    heading(3, "Tokens routed here, most frequent first"),
    element("p", {}, ranked(counts).slice(0, 14).map(([id]) => chip(facts.strings[id]))),
    partners.length ? element("div", {}, heading(3, "Selected together with"),
      element("p", {}, ranked(partners).slice(0, 6).map(([y, together]) => element("span", {},
        expertLink(corpus, y), ` ${percent(together / corpus.use[x])}  `)))) : null,
    largestGate ? element("div", {}, heading(3, "Gates"),
      chart(histogram(gates, largestGate), largestGate, "Gates of this expert")) : null,
    heading(3, "Latents"), latents);
}

function rowsTable(corpus, title, pairs, name) {
  if (!pairs.length) return null;
  return element("div", {}, heading(3, title),
    table(["latent", { number: name }, "fires on"],
      pairs.map(([row, value]) => [latentLink(corpus, row), { number: value }, topTokenChips(corpus, row, 2)])));
}

function latentView(corpus, route) {
  const { facts } = corpus, row = corpus.rowOf.get(route.latent), x = corpus.expert(row);
  const firings = corpus.strongest(row), n = firings.length;
  const expertName = corpus.isMixture ? element("a", { href: address({ expert: x }) }, swatch(x), `expert ${x}`) : "";
  const gates = firings.map((i) => corpus.gate(corpus.tokenOf[i], x) ?? 0);
  const activations = firings.map((i) => corpus.activation(i));
  const magnitudes = activations.map(Math.abs);
  const listed = corpus.promoted.length / corpus.rows;
  const words = (ids, kind) => element("p", {}, Array.from(ids, (id) => chip(facts.strings[id], kind)));
  const together = corpus.cofiring(row).map(([other, count]) => [other, percent(count / Math.max(1, n))]);
  const width = corpus.nearest.length / corpus.rows;
  const nearest = Array.from({ length: width }, (_, j) => row * width + j)
    .map((j) => [corpus.nearest[j], cosine(corpus.cosines[j] / facts.cosine_steps)]);
  const token = (i) => corpus.tokenOf[i], shown = (i) => number(corpus.activation(i));
  const part = (share) => firings.slice(Math.floor(n * share));
  const groups = [
    ["Prompts, the strongest token of each", corpus.onePerPassage(corpus.strongest(row, true), 12)],
    ["Strongest contexts, one per passage", corpus.onePerPassage(firings, 12)],
    ["Around the median", n > 24 ? corpus.onePerPassage(part(0.5), 4) : []],
    ["Weakest tenth", n > 24 ? corpus.onePerPassage(part(0.9), 4) : []],
  ];
  const explanation = facts.explanations[route.latent];
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
  const unscaled = gates.flatMap((gate, j) => (gate > 0 ? [magnitudes[j] / gate] : []));
  const largestUnscaled = unscaled.reduce((a, b) => Math.max(a, b), 0);
  const misses = corpus.isMixture ? corpus.nearMisses(row, 6) : [];
  return element("div", {},
    heading(2, `Latent ${route.latent} `, expertName),
    explanation ? element("p", {}, visible(explanation.text),
      element("span", { class: "dim" }, ["detection", "fuzzing"].filter((name) => explanation[name] !== null)
        .map((name) => ` ${name} ${explanation[name].toFixed(2)}`).join(","))) : null,
    element("p", { class: "dim" },
      `fires on ${percent(n / corpus.numCounted)} of tokens`,
      corpus.isMixture ? `, on ${percent(n / Math.max(1, corpus.use[x]))} of those of its expert` : "",
      `, at most ${number(corpus.maximum[row])}`,
      corpus.isMixture && n ? `, mean gate ${mean(gates).toFixed(2)}` : "",
      facts.neuronpedia_id ? element("span", {}, ", ", element("a", {
        href: `https://neuronpedia.org/${facts.neuronpedia_id}/${route.latent}`, rel: "noreferrer",
      }, "on Neuronpedia")) : ""),
    element("div", { class: "columns" },
      element("div", {},
        n ? element("div", {}, heading(3, "Activations"),
          chart(histogram(magnitudes, corpus.maximum[row]), corpus.maximum[row], "Activations")) : null,
        corpus.isMixture && largestUnscaled ? element("div", {}, heading(3, "Activations without the gate"),
          chart(histogram(unscaled, largestUnscaled), largestUnscaled, "Activations divided by gates")) : null,
        listed ? element("div", {}, heading(3, "Promotes"), words(corpus.promoted.subarray(row * listed, (row + 1) * listed), "raises"),
          heading(3, "Suppresses"), words(corpus.suppressed.subarray(row * listed, (row + 1) * listed), "lowers")) : null),
      element("div", {},
        rowsTable(corpus, corpus.isMixture ? "Fires with, same expert" : "Fires with",
          together.filter(([other]) => corpus.expert(other) === x).slice(0, 6), "of its tokens"),
        rowsTable(corpus, "Fires with, other experts",
          together.filter(([other]) => corpus.expert(other) !== x).slice(0, 6), "of its tokens")),
      element("div", {}, rowsTable(corpus, "Nearest decoder rows", nearest, "cosine"))),
    groups.map(([title, members]) => passages(corpus, title, members.map(token), row, route, members.map(shown))),
    passages(corpus, "Near misses: a token that fires it elsewhere, its expert selected, and silent", misses, row, route,
      misses.map((t) => `gate ${corpus.gate(t, x).toFixed(2)}`)));
}

function tokenView(corpus, route) {
  const t = route.token, { facts } = corpus;
  const byExpert = new Map(corpus.isMixture ? Array.from(corpus.expertsOf(t), (x) => [x, []]) : []);
  for (let i = corpus.firings[t]; i < corpus.firings[t + 1]; i++) {
    const x = corpus.expert(corpus.latents[i]);
    if (!byExpert.has(x)) byExpert.set(x, []);
    byExpert.get(x).push(i);
  }
  const groups = [...byExpert].map(([x, members]) => {
    members.sort((a, b) => Math.abs(corpus.activation(b)) - Math.abs(corpus.activation(a)));
    const gate = corpus.gate(t, x);
    return element("div", {},
      corpus.isMixture ? heading(3, expertLink(corpus, x), gate === null ? " not selected" : ` gate ${gate.toFixed(2)}`) : null,
      members.length ? table(["latent", { number: "activation" }, "fires on"], members.map((i) => [
        latentLink(corpus, corpus.latents[i]), { number: number(corpus.activation(i)) },
        topTokenChips(corpus, corpus.latents[i])])) : element("p", { class: "dim" }, "no latents"));
  });
  const index = corpus.passageOf(t);
  return element("aside", { id: "token", "aria-label": "Token", tabindex: -1 },
    element("a", { class: "close", href: address({ ...route, token: undefined }) }, "Close"),
    heading(2, "Token ", chip(corpus.text(t))),
    element("p", { class: "dim" },
      `${index < facts.num_prompts ? `prompt ${index}` : `passage ${index - facts.num_prompts}`}, position ${t - corpus.passages[index]}, ` +
      `${corpus.counts[t]} latents fire`,
      corpus.excluded[corpus.tokens[t]] ? "; a special token, which does not count" : ""),
    element("div", { class: "columns" }, groups));
}

// A map of pairs of experts; more colour is more, up to the largest value.
function pairMap(corpus, value, describe, label) {
  const order = corpus.expertOrder(), n = order.length;
  const canvas = element("canvas", { width: n, height: n, role: "img", "aria-label": label });
  const context = canvas.getContext("2d"), image = context.createImageData(n, n);
  const values = Float64Array.from({ length: n * n }, (_, i) => value(order[Math.floor(i / n)], order[i % n]));
  const most = values.reduce((a, b) => Math.max(a, b), Number.MIN_VALUE);
  // What is not 0 can be told from it.
  values.forEach((one, i) => image.data.set([255, 140, 20, one && 60 + (195 * one) / most], 4 * i));
  context.putImageData(image, 0, 0);
  const pairAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (offset, length) => order[Math.max(0, Math.min(n - 1, Math.floor((offset / length) * n)))];
    return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
  };
  const line = element("p", { class: "dim" }, "Point at a cell to read it, click it to open the expert of its row.");
  canvas.addEventListener("mousemove", (event) => { line.textContent = describe(...pairAt(event)); });
  canvas.addEventListener("click", (event) => { location.hash = address({ expert: pairAt(event)[0] }); });
  return element("div", {}, canvas, line);
}

function overview(corpus) {
  const { facts } = corpus, n = facts.num_experts;
  const prompts = Array.from({ length: facts.num_prompts }, (_, i) => i);
  const parts = [
    heading(2, `${facts.architecture} SAE at ${facts.hook_name}`),
    element("p", {}, "Choose an expert, then a latent, then a word: each shows what it fires with. Everything is a link, and Back goes back."),
    prompts.length ? element("div", {}, heading(3, "Prompts"),
      inPortions(prompts, 20, (part) => element("div", {}, part.map((i) => passage(
        corpus, corpus.passages[i], null, {}, { after: corpus.lengths[i], label: `${i}` }))))) : null,
  ];
  if (corpus.isMixture) {
    const pairs = [];
    for (let a = facts.num_shared_experts; a < n; a++) {
      for (let b = a + 1; b < n; b++) if (corpus.pairs()[a * n + b]) pairs.push([a, b]);
    }
    pairs.sort(([a, b], [c, d]) => corpus.pairs()[c * n + d] - corpus.pairs()[a * n + b]);
    const least = 0.5, duplicates = corpus.duplicates(least);
    const live = Array.from({ length: n }, (_, x) => Math.max(1, corpus.rowsOf[x].length));
    const pairTable = (title, name, rows) => element("div", {}, heading(3, title),
      rows.length ? table(["experts", { number: name }], rows.map(([a, b, value]) => [
        element("span", {}, expertLink(corpus, a), " and ", expertLink(corpus, b)), { number: value }]))
        : element("p", { class: "dim" }, "none"));
    parts.push(element("p", { class: "dim" },
      "In both maps experts that are selected together are neighbours. Those shared by all tokens are left out."),
    element("div", { class: "columns" },
      element("div", {}, heading(3, "Co-selection: share of the tokens of a row's expert that select the column's too"),
        pairMap(corpus, (a, b) => (a === b ? 0 : corpus.pairs()[a * n + b] / Math.max(1, corpus.use[a])),
          (a, b) => `experts ${a} and ${b}: together on ${percent(corpus.pairs()[a * n + b] / corpus.numCounted)} of tokens, ` +
            `${corpus.lift(a, b).toFixed(2)} times as often as by chance`, "Co-selection of experts; the table beside it has the strongest pairs")),
      element("div", {}, heading(3, `Redundancy: share of a row's latents with a neighbour of cosine ${least} or more in the column's expert`),
        pairMap(corpus, (a, b) => (duplicates.get(a * n + b) ?? 0) / live[a],
          (a, b) => `${duplicates.get(a * n + b) ?? 0} of the ${live[a]} latents of expert ${a} have such a neighbour in expert ${b}`,
          "Redundancy between experts; the table beside it has the strongest pairs")),
      element("div", {},
        pairTable("Selected together most", "tokens", pairs.slice(0, 8).map(([a, b]) => [a, b, percent(corpus.pairs()[a * n + b] / corpus.numCounted)])),
        pairTable("Most redundant", "of the first's latents",
          ranked([...duplicates].map(([pair, count]) => [pair, count / live[Math.floor(pair / n)]])).slice(0, 8)
            .map(([pair, share]) => [Math.floor(pair / n), pair % n, percent(share)])))));
  }
  parts.push(heading(3, "Settings"), element("dl", {},
    Object.entries(facts.config).map(([name, value]) => [element("dt", {}, name), element("dd", {}, `${value}`)]).flat()));
  return element("div", {}, parts);
}
