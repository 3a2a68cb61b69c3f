"use strict";

// Integers and floats as Python packed them, least significant byte first.
const ARRAYS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array,
  i1: Int8Array, i2: Int16Array, i4: Int32Array, f4: Float32Array,
};

async function unpack({ type, data }) {
  if (!("DecompressionStream" in window)) throw new Error("it needs a newer browser");
  const packed = atob(data);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new ARRAYS[type](await new Response(stream).arrayBuffer());
}

// First places of runs of these lengths, one after the other, and the end of the last.
function offsets(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) starts[i + 1] = starts[i] + lengths[i];
  return starts;
}

// 25 divides the 250, or 125, steps of strengths, so that all bins of a histogram hold equally
// many.
const BINS = 25;

// Pairs of a key and a number, the largest first; of equals the one that came first.
function ranked(counts) {
  return [...counts].sort((a, b) => b[1] - a[1]);
}

function histogram(values, most) {
  const counts = new Uint32Array(BINS);
  for (const value of values) {
    // A step at the edge of a bin is in it, whatever way it was rounded.
    const bin = Math.floor((value / most) * BINS + 1e-9);
    counts[Math.max(0, Math.min(BINS - 1, bin))]++;
  }
  return counts;
}

/*
 * The SAE and the corpus. A row is a latent that fires somewhere in it, a firing one latent on one
 * token. Tokens of prompts come first; they, and excluded ones, do not count in statistics.
 */
class Corpus {
  static async load({ facts, arrays }) {
    const names = Object.keys(arrays);
    const unpacked = await Promise.all(names.map((name) => unpack(arrays[name])));
    return new Corpus(facts, Object.fromEntries(names.map((name, i) => [name, unpacked[i]])));
  }

  constructor(facts, arrays) {
    this.facts = facts;
    Object.assign(this, arrays);
    this.size = facts.d_sae / facts.num_experts;
    this.rows = this.alive.length;
    this.isMixture = this.experts.length > 0;
    this.expertsPerToken = this.experts.length / this.tokens.length;
    this.passages = offsets(this.lengths);
    this.firings = offsets(this.counts);
    this.firstCounted = this.passages[facts.num_prompts];
    this.latents = new Uint32Array(this.gaps.length);
    const excluded = new Uint8Array(facts.strings.length);
    for (const id of facts.excluded) excluded[id] = 1;
    this.excluded = excluded;
    this.tokenOf = new Uint32Array(this.gaps.length);
    this.numCounted = 0;
    this.use = new Uint32Array(facts.num_experts);
    const count = new Uint32Array(this.rows), all = new Uint32Array(this.rows);
    const strongest = new Uint8Array(this.rows);
    for (let t = 0; t < this.tokens.length; t++) {
      const counts = this.isCounted(t);
      let row = 0;
      for (let i = this.firings[t]; i < this.firings[t + 1]; i++) {
        row += this.gaps[i];
        this.latents[i] = row;
        this.tokenOf[i] = t;
        all[row]++;
        if (!counts) continue;
        count[row]++;
        strongest[row] = Math.max(strongest[row], Math.abs(this.strengths[i]));
      }
      if (!counts) continue;
      this.numCounted++;
      if (!this.isMixture) this.use[0]++;
      for (const expert of this.expertsOf(t)) this.use[expert]++;
    }
    this.numFirings = count;
    this.maximum = Array.from(strongest, (strength, row) => (strength / facts.steps) * this.largest[row]);
    this.starts = offsets(all);
    this.ofRow = new Uint32Array(this.latents.length);
    const next = this.starts.slice();
    for (let i = 0; i < this.latents.length; i++) this.ofRow[next[this.latents[i]]++] = i;
    this.rowsOf = Array.from({ length: facts.num_experts }, () => []);
    for (let row = 0; row < this.rows; row++) this.rowsOf[this.expert(row)].push(row);
    this.topTokensOf = new Map();
    // Of tokens, as they are shown: what is searched.
    this.names = facts.strings.map((text) => visible(text).trim().toLowerCase());
    this.rowOf = new Map(Array.from(this.alive, (latent, row) => [latent, row]));
  }

  isCounted(token) {
    return token >= this.firstCounted && !this.excluded[this.tokens[token]];
  }

  expert(row) {
    return Math.floor(this.alive[row] / this.size);
  }

  activation(firing) {
    return (this.strengths[firing] / this.facts.steps) * this.largest[this.latents[firing]];
  }

  expertsOf(token) {
    const e = this.expertsPerToken;
    return this.experts.subarray(token * e, (token + 1) * e);
  }

  // Gate of an expert on a token; null if the token did not select it.
  gate(token, expert) {
    if (!this.isMixture) return 1;
    const place = this.expertsOf(token).indexOf(expert);
    if (place < 0) return null;
    return this.gates[token * this.expertsPerToken + place] * this.facts.gate_step;
  }

  passageOf(token) {
    let low = 0, high = this.passages.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.passages[middle] <= token) low = middle; else high = middle;
    }
    return low;
  }

  text(token) {
    return this.facts.strings[this.tokens[token]];
  }

  firingsOf(row) {
    return this.ofRow.subarray(this.starts[row], this.starts[row + 1]);
  }

  // Firings of a row on tokens that count, or on those of prompts, the strongest first; of equals
  // the earlier one.
  strongest(row, ofPrompts = false) {
    return Array.from(this.firingsOf(row))
      .filter((i) => (ofPrompts ? this.tokenOf[i] < this.firstCounted : this.isCounted(this.tokenOf[i])))
      .sort((a, b) => Math.abs(this.strengths[b]) - Math.abs(this.strengths[a]) || a - b);
  }

  // The first of each passage among firings in the order of their rank.
  onePerPassage(firings, most) {
    const seen = new Set(), kept = [];
    for (const i of firings) {
      const passage = this.passageOf(this.tokenOf[i]);
      if (seen.has(passage)) continue;
      seen.add(passage);
      if (kept.push(i) === most) break;
    }
    return kept;
  }

  // Ids of the tokens that fire a row, by the sum of its activations on them.
  topTokens(row) {
    if (!this.topTokensOf.has(row)) {
      const sums = new Map();
      for (const i of this.firingsOf(row)) {
        const token = this.tokenOf[i];
        if (!this.isCounted(token)) continue;
        const id = this.tokens[token];
        sums.set(id, (sums.get(id) ?? 0) + Math.abs(this.strengths[i]));
      }
      this.topTokensOf.set(row, ranked(sums).slice(0, 5).map(([id]) => id));
    }
    return this.topTokensOf.get(row);
  }

  // Rows that fire on the same tokens as a row, with their number.
  cofiring(row) {
    const counts = new Map();
    for (const firing of this.firingsOf(row)) {
      const token = this.tokenOf[firing];
      if (!this.isCounted(token)) continue;
      for (let i = this.firings[token]; i < this.firings[token + 1]; i++) {
        const other = this.latents[i];
        if (other !== row) counts.set(other, (counts.get(other) ?? 0) + 1);
      }
    }
    return ranked(counts);
  }

  /*
   * Tokens whose expert was selected while the latent was silent, though the same token fires it
   * elsewhere: those of the strongest mean activation first, then of the largest gate.
   */
  nearMisses(row, most) {
    const expert = this.expert(row), sums = new Map(), fires = new Set();
    for (const i of this.strongest(row)) {
      const id = this.tokens[this.tokenOf[i]];
      const [sum, n] = sums.get(id) ?? [0, 0];
      sums.set(id, [sum + Math.abs(this.strengths[i]), n + 1]);
      fires.add(this.tokenOf[i]);
    }
    const found = [];
    for (let t = this.firstCounted; t < this.tokens.length; t++) {
      const seen = sums.get(this.tokens[t]);
      if (!seen || fires.has(t) || !this.isCounted(t)) continue;
      const gate = this.gate(t, expert);
      if (gate !== null) found.push([t, seen[0] / seen[1], gate]);
    }
    found.sort((a, b) => b[1] - a[1] || b[2] - a[2] || a[0] - b[0]);
    const seen = new Set();
    return found.filter(([t]) => {
      const passage = this.passageOf(t);
      return seen.size < most && !seen.has(passage) && seen.add(passage);
    }).map(([t]) => t);
  }

  // Tokens that selected each pair of experts, [expert * num_experts + expert].
  pairs() {
    const n = this.facts.num_experts;
    if (!this.pairCounts) {
      this.pairCounts = new Uint32Array(n * n);
      for (let t = 0; t < this.tokens.length; t++) {
        if (!this.isCounted(t)) continue;
        const chosen = this.expertsOf(t);
        for (const a of chosen) for (const b of chosen) this.pairCounts[a * n + b]++;
      }
    }
    return this.pairCounts;
  }

  // Routed experts, each followed by the one that is selected with it most, of those that remain.
  expertOrder() {
    const n = this.facts.num_experts, pairs = this.pairs();
    const rest = new Set(Array.from(this.use.keys()).slice(this.facts.num_shared_experts));
    const order = [];
    let next = this.mostUsed();
    while (rest.delete(next)) {
      order.push(next);
      const similarity = (x) => pairs[order.at(-1) * n + x] / Math.sqrt(this.use[x] || 1);
      next = [...rest].reduce((best, x) => (similarity(x) > similarity(best) ? x : best), [...rest][0]);
    }
    return order;
  }

  // The routed expert that most tokens select.
  mostUsed() {
    const shared = this.facts.num_shared_experts, routed = this.use.subarray(shared);
    return shared + routed.indexOf(Math.max(...routed));
  }

  // Observed co-selection of two experts as a multiple of that of independent ones.
  lift(a, b) {
    const expected = (this.use[a] * this.use[b]) / this.numCounted;
    return expected ? this.pairs()[a * this.facts.num_experts + b] / expected : 0;
  }

  // Means over the latents of an expert of their largest cosine within it and with others; null
  // where there are no two to compare.
  redundancy(expert) {
    const rows = this.rowsOf[expert];
    const mean = (values) => rows.reduce((sum, row) => sum + values[row], 0) / rows.length / this.facts.cosine_steps;
    return {
      within: rows.length > 1 ? mean(this.within) : null,
      between: rows.length && rows.length < this.rows ? mean(this.between) : null,
    };
  }

  // Pairs of experts that share near-duplicates: for each, how many latents of the first have
  // a latent of the second among their nearest whose cosine is at least this.
  duplicates(least) {
    const counts = new Map(), n = this.facts.num_experts, listed = this.nearest.length / this.rows;
    for (let row = 0; row < this.rows; row++) {
      const others = new Set();
      for (let j = row * listed; j < (row + 1) * listed; j++) {
        if (this.cosines[j] >= least * this.facts.cosine_steps) others.add(this.expert(this.nearest[j]));
      }
      others.delete(this.expert(row));
      for (const other of others) {
        const pair = this.expert(row) * n + other;
        counts.set(pair, (counts.get(pair) ?? 0) + 1);
      }
    }
    return counts;
  }

  // Rows for a query: of a latent's number, of explanations with it in them, and those that fire
  // on tokens of that text, or else with it in them: by the sum of activations there, times its
  // share of all, without which those that fire on everything would come first.
  find(query) {
    const wanted = query.trim().toLowerCase();
    if (!wanted) return [];
    const matching = (test) => this.names.flatMap((name, id) => (test(name) ? [id] : []));
    let ids = matching((name) => name === wanted);
    if (!ids.length) ids = matching((name) => name.includes(wanted));
    const asked = new Uint8Array(this.names.length), sums = new Map();
    for (const id of ids) asked[id] = 1;
    for (let t = 0; t < this.tokens.length; t++) {
      if (!asked[this.tokens[t]]) continue;
      for (let i = this.firings[t]; i < this.firings[t + 1]; i++) {
        const row = this.latents[i];
        sums.set(row, (sums.get(row) ?? 0) + Math.abs(this.activation(i)));
      }
    }
    const all = (row) => this.firingsOf(row).reduce((sum, i) => sum + Math.abs(this.activation(i)), 0);
    const rows = ranked([...sums].map(([row, sum]) => [row, (sum * sum) / all(row)])).map(([row]) => row);
    const explained = Object.entries(this.facts.explanations)
      .filter(([, { text }]) => text.toLowerCase().includes(wanted))
      .map(([latent]) => this.rowOf.get(Number(latent)));
    const numbered = /^\d+$/.test(wanted) ? [this.rowOf.get(Number(wanted))] : [];
    return [...new Set([...numbered, ...explained, ...rows])].filter((row) => row !== undefined);
  }
}
