// The transcripts of a study, and the choice of harmless prompts. Model text becomes a text node, never markup.
(() => {
  const { $, figures, choose } = page;
  const json = (id) => JSON.parse($(id).textContent);
  const make = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };

  // ---- transcripts ----
  const talks = json("talk-data");
  const form = $("filters");
  const step = 20;
  const before = talks.outputs[talks.unsteered];
  let matches = [];

  const refused = (prompt, answer) =>
    answer.label === "refused" || (prompt.set !== "harmful" && answer.label === "partial");
  // newly | lost | same, or "" when one side is missing or unscored
  const change = (prompt, old, now) => {
    if (!old || !now || old.label === "unscored" || now.label === "unscored") return "";
    const [was, is] = [refused(prompt, old), refused(prompt, now)];
    return was === is ? "same" : is ? "newly" : "lost";
  };
  const CHANGES = { newly: "newly refused", lost: "no longer refused", same: "unchanged", "": "not comparable" };

  const find = () => {
    const { spec, change: wanted, set, category, search } = Object.fromEntries(new FormData(form));
    const after = talks.outputs[spec] || {};
    const needle = search.trim().toLowerCase();
    const fits = ({ prompt, old, now, kind }) =>
      (!set || prompt.set === set) &&
      (!category || prompt.category === category) &&
      (wanted === "all" || wanted === kind ||
        (wanted === "flipped" && (kind === "newly" || kind === "lost")) ||
        (wanted === "degenerate" && [old, now].some((answer) => answer?.label === "degenerate"))) &&
      (!needle || [prompt.id, prompt.text, old?.text, now?.text].some((text) => text?.toLowerCase().includes(needle)));
    return talks.prompts
      .map((prompt) => {
        const [old, now] = [before[prompt.id], after[prompt.id]];
        return { prompt, old, now, kind: change(prompt, old, now) };
      })
      .filter(fits);
  };

  let tips = 0;
  const side = (title, answer) => {
    const head = make("div", { className: "head" }, make("h4", { textContent: title }));
    const box = make("div", { className: "side" }, head);
    if (!answer) {
      box.append(make("p", { className: "missing", textContent: "No answer was recorded." }));
      return box;
    }
    const chip = make("button", { type: "button", className: `chip ${answer.label}`, textContent: answer.label });
    const evidence = [answer.judge, answer.evidence || "no evidence given"].filter(Boolean).join(": ");
    const tip = make("span", { className: "tip", id: `tip-${++tips}`, textContent: evidence });
    tip.setAttribute("role", "tooltip");
    chip.setAttribute("aria-describedby", tip.id);
    chip.onkeydown = (event) => head.classList.toggle("closed", event.key === "Escape");
    chip.onblur = chip.onmouseleave = () => head.classList.remove("closed");
    const end = answer.stop === "length" ? ", cut at the length limit" : "";
    head.append(chip, tip);
    box.append(
      make("pre", { textContent: answer.text || "(empty)", dir: "auto" }),
      make("p", { className: "small", textContent: `${answer.tokens} tokens${end}` }),
    );
    return box;
  };
  const card = ({ prompt, old, now, kind }) => {
    const about = [prompt.id, talks.sets[prompt.set], prompt.category, prompt.twin && `twin of ${prompt.twin}`];
    const title = form.elements.spec.selectedOptions[0]?.textContent ?? "steered";
    const item = make(
      "li",
      {},
      make("h3", { textContent: prompt.text, dir: "auto" }),
      make("p", { className: "about", textContent: [...about.filter(Boolean), CHANGES[kind]].join(" · ") }),
    );
    if (prompt.earlier.length) {
      const turns = prompt.earlier.map(([role, text]) => make("pre", { textContent: `${role}: ${text}`, dir: "auto" }));
      item.append(make("details", {}, make("summary", { textContent: `Earlier turns (${turns.length})` }), ...turns));
    }
    item.append(make("div", { className: "sides" }, side("unsteered", old), side(title, now)));
    return item;
  };
  const grow = () => {
    const shown = $("cards").childElementCount;
    $("cards").append(...matches.slice(shown, shown + step).map(card));
    $("more").hidden = $("cards").childElementCount >= matches.length;
    const tally = Object.entries(CHANGES)
      .map(([kind, text]) => [matches.filter((match) => match.kind === kind).length, text])
      .filter(([count]) => count)
      .map(([count, text]) => `${count} ${text}`);
    $("count").textContent =
      `${matches.length} of ${talks.prompts.length} prompts match` +
      (tally.length ? `: ${tally.join(", ")}. ` : ". ") +
      `Showing ${$("cards").childElementCount}.`;
  };
  const refresh = () => {
    matches = find();
    $("cards").replaceChildren();
    grow();
  };

  const fill = (select, pairs) =>
    select.append(...pairs.map(([value, text]) => make("option", { value, textContent: text })));
  for (const kind of ["steered", "control"]) {
    const specs = talks.specs.filter((item) => item.kind === kind);
    if (!specs.length) continue;
    const options = make("optgroup", { label: kind });
    fill(options, specs.map((item) => [item.spec, `${kind}, ${item.label}`]));
    form.elements.spec.append(options);
  }
  const best = talks.specs.find((item) => item.best);
  if (best) form.elements.spec.value = best.spec;
  fill(form.elements.set, Object.entries(talks.sets).filter(([key]) => talks.prompts.some((p) => p.set === key)));
  fill(form.elements.category, [...new Set(talks.prompts.map((p) => p.category))].filter(Boolean).sort().map((c) => [c, c]));

  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => event.preventDefault());
  $("more").onclick = grow;
  $("tradeoff-set").addEventListener("change", (event) => {
    const { value } = event.target;
    const title = figures.tradeoff?.layout.xaxis.title;
    if (title) title.text = `${value === "plain" ? "plain benign prompts" : "look-alikes"} refused, %`;
    choose(value, "tradeoff");
  });
  refresh();
})();
