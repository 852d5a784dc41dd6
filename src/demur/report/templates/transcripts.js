// The transcripts, side by side. Model text becomes a text node, never markup.
(() => {
  const { $ } = page;
  const make = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const talks = JSON.parse($("talk-data").textContent);
  const form = $("filters");
  const step = 20;
  // an id may be the name of something that every object has
  const get = (map, key) => (map && Object.hasOwn(map, key) ? map[key] : undefined);
  let matches = [];

  const refused = (prompt, answer) => answer.label === "refused" || (!prompt.harmful && answer.label === "partial");
  // newly | lost | same, or "" when one side is missing or unscored
  const change = (prompt, old, now) => {
    if (!old || !now || old.label === "unscored" || now.label === "unscored") return "";
    const [was, is] = [refused(prompt, old), refused(prompt, now)];
    return was === is ? "same" : is ? "newly" : "lost";
  };
  const CHANGES = { newly: "newly refused", lost: "no longer refused", same: "unchanged", "": "not comparable" };
  const verdicts = (answer) => (answer ? [answer, ...(answer.others ?? [])] : []);
  // two judges say different things; who does not say, differs from nobody
  const contested = (answer) =>
    [
      verdicts(answer).map(({ label }) => label).filter((label) => label !== "unscored"),
      verdicts(answer).map(({ harmful }) => harmful).filter(Boolean),
    ].some((said) => new Set(said).size > 1);

  const find = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const needle = wanted.search.trim().toLowerCase();
    const chosen = Object.keys(talks.facets).filter((name) => wanted[name]);
    const before = talks.outputs[talks.base.key];
    const after = get(talks.outputs, wanted.spec);
    const fits = ({ prompt, old, now, kind }) =>
      chosen.every((name) => prompt[name] === wanted[name]) &&
      (!wanted.before || old?.label === wanted.before) &&
      (!wanted.after || now?.label === wanted.after) &&
      (!wanted.judges || [old, now].some(contested)) &&
      (wanted.change === "all" || wanted.change === kind ||
        (wanted.change === "flipped" && (kind === "newly" || kind === "lost")) ||
        (wanted.change === "degenerate" && [old, now].some((answer) => answer?.label === "degenerate"))) &&
      (!needle || [prompt.id, prompt.text, old?.text, now?.text].some((text) => text?.toLowerCase().includes(needle)));
    return talks.prompts
      .map((prompt) => {
        const [old, now] = [get(before, prompt.id), get(after, prompt.id)];
        return { prompt, old, now, kind: change(prompt, old, now) };
      })
      .filter(fits);
  };

  let tips = 0;
  const HARM = { yes: ", harmful", no: ", not harmful" };
  const chip = (verdict, head, several) => {
    const text = verdict.label + (HARM[verdict.harmful] ?? "");
    const node = make("button", {
      type: "button",
      className: `chip ${verdict.label}`,
      textContent: several ? `${verdict.judge}: ${text}` : text,
    });
    const evidence = [verdict.judge, verdict.evidence || "no evidence given"].filter(Boolean).join(": ");
    const tip = make("span", { className: "tip", id: `tip-${++tips}`, textContent: evidence });
    tip.setAttribute("role", "tooltip");
    node.setAttribute("aria-describedby", tip.id);
    node.onkeydown = (event) => head.classList.toggle("closed", event.key === "Escape");
    node.onblur = node.onmouseleave = () => head.classList.remove("closed");
    return [node, tip];
  };
  const side = (title, answer) => {
    const head = make("div", { className: "head" }, make("h4", { textContent: title }));
    const box = make("div", { className: "side" }, head);
    if (!answer) {
      box.append(make("p", { className: "missing", textContent: "No answer was recorded." }));
      return box;
    }
    const said = verdicts(answer);
    head.append(...said.flatMap((verdict) => chip(verdict, head, said.length > 1)));
    const end = answer.stop === "length" ? ", cut at the length limit" : "";
    box.append(
      make("pre", { textContent: answer.text || "(empty)", dir: "auto" }),
      make("p", { className: "small", textContent: `${answer.tokens} tokens${end}` }),
    );
    return box;
  };
  const card = ({ prompt, old, now, kind }) => {
    const title = form.elements.spec.selectedOptions[0]?.textContent ?? "steered";
    const item = make(
      "li",
      {},
      make("h3", { textContent: prompt.text, dir: "auto" }),
      make("p", { className: "about", textContent: [...prompt.about, CHANGES[kind]].join(" · ") }),
    );
    if (prompt.earlier.length) {
      const turns = prompt.earlier.map(([role, text]) => make("pre", { textContent: `${role}: ${text}`, dir: "auto" }));
      item.append(make("details", {}, make("summary", { textContent: `Earlier turns (${turns.length})` }), ...turns));
    }
    item.append(make("div", { className: "sides" }, side(talks.base.name, old), side(title, now)));
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
  for (const group of new Set(talks.sides.map((one) => one.group))) {
    const options = make("optgroup", { label: group });
    fill(options, talks.sides.filter((one) => one.group === group).map((one) => [one.key, one.name]));
    form.elements.spec.append(options);
  }
  const opened = talks.sides.find((one) => one.chosen);
  if (opened) form.elements.spec.value = opened.key;
  for (const [name, pairs] of Object.entries(talks.facets)) fill(form.elements[name], pairs);

  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => event.preventDefault());
  $("more").onclick = grow;
  refresh();
})();
