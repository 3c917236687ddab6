"use strict";
(() => {
  // The state is in the address: #sheet-NAME?word=...&speaker=...&split=...&kind=...&q=...
  const find = (id) => document.getElementById(id);
  const grid = find("cards"), form = document.querySelector(".controls"), told = find("told");
  const tabs = [...document.querySelectorAll("[data-sheet]")].filter((tab) => tab.matches("a"));
  const fields = [...form.elements].filter((field) => field.name);
  const cards = [...grid.querySelectorAll(".card")].map((card) => ({
    card,
    places: new Map(card.dataset.sheets.split(" ").map((place) => {
      const at = place.lastIndexOf(":");
      return [place.slice(0, at), Number(place.slice(at + 1))];
    })),
    text: `${card.dataset.key} ${card.dataset.word} ${card.dataset.video} ${card.textContent}`.toLowerCase(),
  }));
  const first = tabs[0].dataset.sheet;

  for (const { card } of cards) { // a failed clip's first frame stands on the page already
    const frame = find(card.id.replace("clip", "frame"));
    if (frame) {
      const copy = frame.cloneNode();
      copy.removeAttribute("id");
      copy.alt = "";
      card.querySelector(".tile").append(copy);
    }
  }

  const read = () => {
    const [name, query] = decodeHash();
    const found = new URLSearchParams(query);
    return { sheet: tabs.some((tab) => tab.dataset.sheet === name) ? name : first, found };
  };
  const decodeHash = () => {
    const hash = location.hash.startsWith("#sheet-") ? location.hash.slice(7) : "";
    const cut = hash.indexOf("?");
    return cut < 0 ? [hash, ""] : [hash.slice(0, cut), hash.slice(cut + 1)];
  };
  const address = (sheet, values) => {
    const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value));
    return `#sheet-${sheet}${[...query].length ? `?${query}` : ""}`;
  };
  const chosen = () => Object.fromEntries(fields.map((field) => [field.name, field.value]));
  let sheet = first;

  const show = () => {
    const values = chosen(), words = values.q.toLowerCase().split(/\s+/).filter(Boolean);
    const tab = tabs.find((other) => other.dataset.sheet === sheet);
    const mine = cards.filter(({ places }) => sheet === "all" || places.has(sheet));
    if (sheet !== "all") mine.sort((a, b) => a.places.get(sheet) - b.places.get(sheet));
    const kept = mine.filter(({ card, text }) =>
      ["word", "speaker", "split", "kind"].every((name) => !values[name] || card.dataset[name] === values[name]) &&
      words.every((word) => text.includes(word)));
    const nodes = [];
    let heading = null;
    for (const { card } of kept) {
      const group = tab.dataset.group && card.dataset[tab.dataset.group];
      if (group && group !== heading) {
        heading = group;
        const line = document.createElement("li"), title = document.createElement("h3"), bdi = document.createElement("bdi");
        line.className = "group";
        bdi.textContent = group;
        title.append(bdi);
        line.append(title);
        nodes.push(line);
      }
      const about = tab.dataset.figure && figures(card).find(([title]) => title === tab.dataset.figure);
      card.querySelector(".value").textContent = about ? about[1] : "";
      card.hidden = false;
      nodes.push(card);
    }
    grid.dataset.sheet = sheet;
    grid.replaceChildren(...nodes);
    for (const other of tabs) {
      if (other === tab) other.setAttribute("aria-current", "true");
      else other.removeAttribute("aria-current");
    }
    const closed = tab.closest("details");
    if (closed) closed.open = true;
    find("none").hidden = kept.length > 0;
    told.textContent = `${kept.length} of ${mine.length} clips. ${tab.dataset.about}`;
  };
  const figures = (card) => card.dataset.figures.split("\n").filter(Boolean).map((line) => line.split("\t"));

  const follow = (arrived) => {
    const state = read();
    sheet = state.sheet;
    for (const field of fields) {
      field.value = state.found.get(field.name) || "";
      if (field.selectedIndex < 0) field.selectedIndex = 0; // a link to a word that is not here
    }
    show();
    if (arrived && location.hash.startsWith("#sheet-")) {
      find("clips").scrollIntoView();
      find("h-clips").focus({ preventScroll: true });
    }
  };
  addEventListener("hashchange", () => {
    if (location.hash.startsWith("#sheet-")) follow(true);
  });
  form.addEventListener("input", () => {
    history.replaceState(null, "", address(sheet, chosen()));
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  find("clear").addEventListener("click", () => {
    for (const field of fields) field.value = "";
    history.replaceState(null, "", address(sheet, {}));
    show();
  });
  find("play").addEventListener("click", (event) => {
    const on = grid.classList.toggle("playing");
    event.currentTarget.setAttribute("aria-pressed", String(on));
    event.currentTarget.textContent = on ? "Stop" : "Play all";
  });
  for (const tile of document.querySelectorAll(".averages .tile")) {
    tile.addEventListener("click", () => { location.hash = address("all", { word: tile.dataset.word }); });
  }

  const dialog = find("detail");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let current = null;
  const detail = (card) => {
    current = card;
    const tile = card.querySelector(".tile"), big = find("detail-tile"), film = find("detail-strip");
    const { key, word, speaker, split, kind, video } = card.dataset;
    big.className = tile.className;
    big.style.cssText = tile.style.cssText;
    big.classList.toggle("playing", !still.matches);
    big.setAttribute("aria-label", `Mouth crops of ${key}`);
    big.replaceChildren(...[...tile.children].map((child) => child.cloneNode()));
    find("detail-word").textContent = word;
    find("detail-key").textContent = key;
    find("detail-video").textContent = video;
    find("detail-where").textContent = [split, speaker && `speaker ${speaker}`, kind].filter(Boolean).join(", ");
    const reasons = [...card.querySelectorAll(".reasons li, .bad")].map((reason) => reason.textContent);
    find("detail-reasons").replaceChildren(...reasons.map((reason) => {
      const line = document.createElement("li");
      line.textContent = reason;
      return line;
    }));
    film.replaceChildren();
    if (tile.classList.contains("strip")) {
      const count = Number(getComputedStyle(tile).getPropertyValue("--frames"));
      for (let n = 0; n < count; n += 1) {
        const frame = document.createElement("div");
        frame.className = [...tile.classList].join(" ");
        frame.style.setProperty("--row", tile.style.getPropertyValue("--row"));
        frame.style.backgroundPositionX = `calc(${-n} * var(--tile))`;
        frame.style.animation = "none";
        film.append(frame);
      }
    }
    find("detail-figures").replaceChildren(...figures(card).flatMap(([title, value]) => {
      const name = document.createElement("dt"), what = document.createElement("dd");
      name.textContent = title;
      what.textContent = value;
      return [name, what];
    }));
    const [before, after] = beside(card);
    find("previous").disabled = !before;
    find("next").disabled = !after;
    if (!dialog.open) dialog.showModal();
  };
  const beside = (card) => { // the cards before and after, as they are shown
    const shown = [...grid.querySelectorAll(".card")], at = shown.indexOf(card);
    return [shown[at - 1], shown[at + 1]];
  };
  const step = (n) => {
    const other = beside(current)[n];
    if (other) detail(other);
  };
  grid.addEventListener("click", (event) => {
    if (event.target.closest(".tile")) detail(event.target.closest(".card"));
  });
  find("previous").addEventListener("click", () => step(0));
  find("next").addEventListener("click", () => step(1));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(0);
    else if (event.key === "ArrowRight") step(1);
  });
  dialog.addEventListener("close", () => current.querySelector(".tile").focus());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  follow(false);
  // The browser goes to the link of that name once all is loaded; the clips are what was asked for.
  addEventListener("load", () => setTimeout(() => follow(true)));
})();
