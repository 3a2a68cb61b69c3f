"use strict";

function readRoute(hash, corpus) {
  const search = /^#search=(.*)$/.exec(hash);
  if (search) {
    try {
      return { search: decodeURIComponent(search[1]) };
    } catch {
      return { search: search[1] };
    }
  }
  const [expert, latent, token] = hash.slice(1).split("/").map((part) => (/^\d+$/.test(part) ? Number(part) : undefined));
  const route = {};
  if (latent !== undefined && corpus.rowOf.has(latent)) {
    route.latent = latent;
    route.expert = corpus.expert(corpus.rowOf.get(latent));
  } else if (expert < corpus.facts.num_experts) {
    route.expert = expert;
  }
  if (token < corpus.tokens.length) route.token = token;
  return route;
}

async function start() {
  const corpus = await Corpus.load(JSON.parse(document.getElementById("data").textContent));
  const { facts } = corpus;
  const [nav, section, main, found] = ["experts", "latents", "main", "found"].map((id) => document.getElementById(id));
  const search = document.getElementById("search");
  // Of the lists: how they are sorted and filtered, and what of them is shown elsewhere.
  const state = { expertOrder: "use", latentOrder: "density", filter: "" };
  const silent = facts.d_sae - corpus.rows;
  document.title = `${facts.architecture} SAE at ${facts.hook_name}`;
  document.getElementById("title").textContent = `${facts.architecture} SAE · ${facts.model_name ?? ""} ${facts.hook_name}`;
  document.getElementById("summary").textContent =
    `${corpus.isMixture ? `${facts.num_experts} experts of ${corpus.size} latents` : `${facts.d_sae} latents`}, ` +
    `${corpus.numCounted.toLocaleString("en")} tokens, ${percent(silent / facts.d_sae)} of latents silent here`;
  document.body.classList.toggle("dense", !corpus.isMixture);
  let last = null;

  function drawLatents(route) {
    found.textContent = "";
    if (route.search === undefined) {
      const expert = route.expert ?? (corpus.isMixture ? corpus.mostUsed() : 0);
      section.replaceChildren(expertView(corpus, expert, state));
      return;
    }
    search.elements.text.value = route.search;
    const rows = corpus.find(route.search), query = `“${visible(route.search)}”`;
    found.textContent = `${rows.length} latents for ${query}`;
    section.replaceChildren(heading(2, query), latentTable(corpus, rows, state));
  }

  // Where columns are below each other, this one may be out of sight.
  function moveTo(column) {
    column.focus({ preventScroll: true });
    column.scrollIntoView();
  }

  // The lists stay as they are, and so does the place in them, where only the latent or the token
  // changed. The focus moves on to what was asked for.
  function draw() {
    const route = readRoute(location.hash, corpus), word = document.activeElement.closest(".passage a");
    const changed = (...names) => !last || names.some((name) => route[name] !== last[name]);
    // Of several steps back at once each is told, when the last has been drawn already.
    if (!changed("expert", "latent", "token", "search")) return;
    Object.assign(state, { expert: route.expert, latent: route.latent });
    if (changed("expert", "search")) {
      const isSearch = route.search !== undefined;
      Object.assign(state, { filter: "", found: isSearch });
      if (isSearch) state.latentOrder = "as found";
      else if (state.latentOrder === "as found") state.latentOrder = "density";
      if (corpus.isMixture) nav.replaceChildren(expertsView(corpus, state));
      drawLatents(route);
    }
    if (changed("latent")) {
      main.replaceChildren(route.latent === undefined ? overview(corpus) : latentView(corpus, route));
      main.scrollTop = 0;
      for (const row of section.querySelectorAll("tbody tr")) {
        const isShown = readRoute(row.querySelector("a").hash, corpus).latent === route.latent;
        if (isShown && route.latent !== undefined) row.setAttribute("aria-current", "true");
        else row.removeAttribute("aria-current");
      }
    }
    document.getElementById("token")?.remove();
    if (route.token !== undefined) main.append(tokenView(corpus, route));
    if (!last) main.setAttribute("aria-busy", "false");
    else if (route.token !== undefined && changed("token")) {
      document.getElementById("token").focus({ preventScroll: true });
      // From behind the panel.
      word?.scrollIntoView({ block: "nearest" });
    } else if (route.latent !== undefined && changed("latent")) moveTo(main);
    else if (changed("latent", "expert", "search")) moveTo(section);
    else if (changed("token")) main.focus({ preventScroll: true });
    last = route;
  }

  search.addEventListener("submit", (event) => {
    event.preventDefault();
    location.hash = address({ search: event.target.elements.text.value });
  });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const word = event.target.closest?.(".passage a");
    if (step && word) {
      const words = [...word.parentElement.children];
      const next = words[words.indexOf(word) + step];
      if (!next) return;
      for (const one of words) one.tabIndex = one === next ? 0 : -1;
      next.focus();
      event.preventDefault();
    } else if (event.key === "Escape" && last?.token !== undefined) {
      location.hash = address({ ...last, token: undefined });
    }
  });
  window.addEventListener("hashchange", draw);
  draw();
}

start().catch((error) => {
  document.getElementById("main").textContent = `The page cannot be read: ${error.message}`;
  throw error;
});
