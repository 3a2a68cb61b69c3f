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
  const state = { expertOrder: "use", latentOrder: "density", filter: "" };
  const silent = facts.d_sae - corpus.rows;
  document.title = `${facts.architecture} SAE at ${facts.hook_name}`;
  document.getElementById("title").textContent = `${facts.architecture} SAE · ${facts.model_name ?? ""} ${facts.hook_name}`;
  document.getElementById("summary").textContent =
    `${corpus.isMixture ? `${facts.num_experts} experts of ${corpus.size} latents` : `${facts.d_sae} latents`}, ` +
    `${corpus.numCounted.toLocaleString("en")} tokens, ${percent(silent / facts.d_sae)} of latents silent here`;
  document.body.classList.toggle("dense", !corpus.isMixture);
  let last = null;

  function drawExperts(route) {
    nav.replaceChildren(...(corpus.isMixture ? [expertsView(corpus, route, state, redrawLists)] : []));
  }

  function drawLatents(route) {
    found.textContent = "";
    if (route.search === undefined) {
      const expert = route.expert ?? (corpus.isMixture ? corpus.mostUsed() : 0);
      section.replaceChildren(expertView(corpus, { ...route, expert }, state, redrawLists));
      return;
    }
    const rows = corpus.find(route.search), query = `“${visible(route.search)}”`;
    found.textContent = `${rows.length} latents for ${query}`;
    section.replaceChildren(heading(2, query), latentTable(corpus, rows, route, state, redrawLists));
  }

  // After another order or filter was chosen, in a control that keeps the focus.
  function redrawLists() {
    const control = document.activeElement?.id;
    drawExperts(last);
    drawLatents(last);
    if (control) document.getElementById(control)?.focus();
  }

  // The lists stay as they are, and so does the place in them, where only the latent or the token
  // changed. The focus moves on to what was asked for.
  function draw() {
    const route = readRoute(location.hash, corpus);
    const changed = (...names) => !last || names.some((name) => route[name] !== last[name]);
    if (changed("expert", "search")) {
      const isSearch = route.search !== undefined;
      Object.assign(state, { filter: "", found: isSearch, latentOrder: isSearch ? "as found" : "density" });
      drawExperts(route);
      drawLatents(route);
      if (last) section.focus({ preventScroll: true });
    }
    if (changed("latent", "expert", "search")) {
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
    if (last && changed("latent", "token") && (route.latent ?? route.token ?? last.token) !== undefined) {
      (document.getElementById("token") ?? main).focus({ preventScroll: true });
    }
    last = route;
    main.setAttribute("aria-busy", "false");
  }

  document.getElementById("search").addEventListener("submit", (event) => {
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
