"use strict";
(() => {
  const shown = 200; // matching lines that are listed in one part
  const query = document.getElementById("query");
  const status = document.getElementById("hits");
  const parts = [...document.querySelectorAll("details[data-search]")].map((element) => ({ element, before: null, lines: null }));

  const groups = [...document.querySelectorAll("details[data-group]")].map((element) => ({ element, before: null }));

  document.getElementById("search").hidden = false;
  document.querySelectorAll(".buttons").forEach((element) => { element.hidden = false; });

  const linesOf = (part) => {
    part.lines ??= [...part.element.querySelectorAll("pre")].flatMap((pre) => pre.textContent.split("\n")).filter((line) => line);
    return part.lines;
  };

  const marked = (line, wanted) => {
    const element = document.createElement(line[0] === "+" ? "ins" : line[0] === "-" ? "del" : "span");
    const lower = line.toLowerCase();
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
      const mark = document.createElement("mark");
      mark.textContent = line.slice(at, at + wanted.length);
      element.append(line.slice(from, at), mark);
      from = at + wanted.length;
    }
    element.append(`${line.slice(from)}\n`);
    return element;
  };

  const restore = (part) => {
    part.element.querySelector(":scope > .matches")?.remove();
    part.element.classList.remove("searching");
    part.element.hidden = false;
    part.element.querySelector(".hits").textContent = "";
    if (part.before !== null) part.element.open = part.before;
    part.before = null;
  };

  const show = (part, wanted) => {
    const name = part.element.querySelector("summary b").textContent.toLowerCase();
    const found = linesOf(part).filter((line) => line.toLowerCase().includes(wanted));
    const opened = part.before ?? part.element.open;
    restore(part);
    part.before = opened;
    part.element.hidden = found.length === 0 && !name.includes(wanted);
    if (found.length === 0) return 0;
    const list = document.createElement("pre");
    list.className = "matches";
    list.tabIndex = 0;
    list.setAttribute("aria-label", "Matching lines");
    list.append(...found.slice(0, shown).map((line) => marked(line, wanted)));
    if (found.length > shown) list.append(`and ${(found.length - shown).toLocaleString("en")} more\n`);
    part.element.append(list);
    part.element.classList.add("searching");
    part.element.querySelector(".hits").textContent = found.length === 1 ? "1 match" : `${found.length.toLocaleString("en")} matches`;
    part.element.open = true;
    return found.length;
  };

  // a group is open while one of its parts matches
  const gather = (wanted) => groups.forEach((group) => {
    const inside = [...group.element.querySelectorAll("details[data-search]")];
    if (wanted) {
      group.before ??= group.element.open;
      group.element.open = inside.some((element) => !element.hidden);
      group.element.hidden = !group.element.open;
    } else {
      group.element.open = group.before ?? group.element.open;
      group.element.hidden = false;
      group.before = null;
    }
  });

  const search = () => {
    const wanted = query.value.trim().toLowerCase();
    if (!wanted) {
      parts.forEach(restore);
      gather("");
      status.textContent = "";
      return;
    }
    const total = parts.reduce((sum, part) => sum + show(part, wanted), 0);
    gather(wanted);
    status.textContent = total === 1 ? "1 match" : `${total.toLocaleString("en")} matches`;
  };

  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  });
  document.getElementById("search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    search();
    document.querySelector("details.searching > summary")?.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey && event.target !== query) {
      event.preventDefault();
      query.focus();
      query.select();
    } else if (event.key === "Escape" && query.value) {
      event.preventDefault();
      clearTimeout(waiting);
      query.value = "";
      search();
      query.focus();
    }
  });
  for (const [data, open] of [["unfold", true], ["fold", false]]) {
    document.querySelectorAll(`[data-${data}]`).forEach((button) => button.addEventListener("click", () => {
      document.getElementById(button.dataset[data]).querySelectorAll("details").forEach((element) => { element.open = open; });
    }));
  }
  const reveal = () => {
    const target = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    for (let element = target?.closest("details"); element; element = element.parentElement.closest("details")) element.open = true;
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
