// The conversations, side by side: of hundreds only the chosen one is on the page. Model text becomes a text node.
(() => {
  const { $ } = page;
  const make = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const data = JSON.parse($("talk-data").textContent);
  const form = $("filters");
  const picker = $("talk");
  let matches = [];

  // the chosen side; 0 where there is the base alone
  const right = () => Number(form.elements.side?.value ?? 0);
  const kindOf = ({ sides }) => {
    const [before, after] = [sides[0].outcome, sides[right()].outcome];
    if (before === null || after === null) return "unscored";
    if (!right()) return before ? "yes" : "no";
    return before ? (after ? "both" : "stopped") : after ? "through" : "neither";
  };
  const shown = ({ sides }) => (right() ? [sides[0], sides[right()]] : [sides[0]]);
  const find = () => {
    const wanted = Object.fromEntries(new FormData(form));
    return data.talks
      .map((talk) => ({ talk, kind: kindOf(talk) }))
      .filter(({ talk, kind }) => {
        const back = shown(talk).some(({ turns }) => turns.some((turn) => turn.back));
        return (
          (!wanted.kind || wanted.kind === kind) &&
          (!wanted.objective || Number(wanted.objective) === talk.objective) &&
          (!wanted.seed || Number(wanted.seed) === talk.seed) &&
          (!wanted.back || (wanted.back === "yes") === back)
        );
      });
  };

  const SUCCESS = { true: "reached the objective", false: "objective not reached", null: "success could not be scored" };
  const said = (turn, number) => {
    const name = make("span", { textContent: `Turn ${number}` });
    if (turn.back) name.append(", ", make("strong", { textContent: "taken back" }));
    const success = turn.back
      ? "not judged, as the turn was taken back"
      : make(turn.success ? "strong" : "span", { textContent: SUCCESS[turn.success] });
    const judged = make("p", { className: "small" }, "Success: ", success);
    if (turn.evidence) judged.append(make("bdi", { textContent: ` (${turn.evidence})` }));
    return make(
      "li",
      { className: turn.back ? "back" : turn.success ? "reached" : "" },
      make("p", { className: "who" }, name, ": attacker"),
      make("pre", { className: "asked", textContent: turn.user || "(empty)", dir: "auto" }),
      make(
        "p",
        { className: "who" },
        "Reply ",
        make("span", { className: `chip ${turn.label}`, textContent: turn.label }),
        `${turn.tokens} tokens`,
      ),
      make("pre", { textContent: turn.reply || "(empty)", dir: "auto" }),
      judged,
    );
  };
  const column = (place, talk, other) => {
    const { told, turns } = talk.sides[place];
    const title = make("h4", { textContent: data.sides[place], id: `on-${place}`, tabIndex: -1 });
    const box = make("section", { className: "side" }, title, make("p", { className: "small", textContent: told }));
    box.setAttribute("aria-labelledby", title.id);
    if (other !== place) {
      box.append(make("a", { className: "jump", href: `#on-${other}`, textContent: `Go to ${data.sides[other]}` }));
    }
    let number = 1;
    const list = turns.map((turn) => {
      const item = said(turn, number);
      if (!turn.back) number += 1;
      return item;
    });
    if (list.length) box.append(make("ol", { className: "turns" }, ...list));
    else box.append(make("p", { className: "missing", textContent: "No turn was recorded." }));
    return box;
  };
  const show = () => {
    const place = picker.selectedIndex;
    const found = matches[place];
    $("place").textContent = found ? `Conversation ${place + 1} of ${matches.length}.` : "";
    if (!found) {
      $("pair").replaceChildren(make("p", { className: "about", textContent: "No conversation matches." }));
      return;
    }
    const { talk, kind } = found;
    const [id, text] = data.objectives[talk.objective];
    const sides = right() ? [column(0, talk, right()), column(right(), talk, 0)] : [column(0, talk, 0)];
    $("pair").replaceChildren(
      make("h3", { textContent: text || id, dir: "auto" }),
      make("p", { className: "about", textContent: [id, `seed ${talk.seed}`, data.kinds[kind]].join(" · ") }),
      make("div", { className: "sides" }, ...sides),
    );
  };
  const refresh = () => {
    const kept = matches[picker.selectedIndex]?.talk;
    matches = find();
    const options = matches.map(({ talk, kind }, place) =>
      make("option", {
        value: place,
        textContent: `${data.objectives[talk.objective][0]}, seed ${talk.seed}: ${data.kinds[kind]}`,
      }),
    );
    picker.replaceChildren(...options);
    if (matches.length) picker.selectedIndex = Math.max(0, matches.findIndex(({ talk }) => talk === kept));
    const tally = Object.entries(data.kinds)
      .map(([kind, text]) => [matches.filter((match) => match.kind === kind).length, text])
      .filter(([count]) => count)
      .map(([count, text]) => `${count} ${text}`);
    $("count").textContent =
      `${matches.length} of ${data.talks.length} conversations match` + (tally.length ? `. ${tally.join("; ")}.` : ".");
    show();
  };
  // round, so that the button keeps the focus
  const step = (by) => {
    if (!matches.length) return;
    picker.selectedIndex = (picker.selectedIndex + by + matches.length) % matches.length;
    show();
  };

  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => event.preventDefault());
  picker.addEventListener("input", show);
  $("earlier").onclick = () => step(-1);
  $("later").onclick = () => step(1);
  // a number in a table leads to its conversations
  for (const link of document.querySelectorAll("a[data-side]")) {
    link.addEventListener("click", () => {
      form.reset();
      if (Number(link.dataset.side) && form.elements.side) form.elements.side.value = link.dataset.side;
      form.elements.objective.value = link.dataset.objective ?? "";
      form.elements.kind.value = link.dataset.kind ?? "";
      refresh();
    });
  }
  refresh();
})();
