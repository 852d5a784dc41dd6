// The choice of harmless prompts in the trade-off of a study.
(() => {
  const { $, figures, choose } = page;
  $("tradeoff-set").addEventListener("change", (event) => {
    const { value } = event.target;
    const title = figures.tradeoff?.layout.xaxis.title;
    if (title) title.text = `${value === "plain" ? "plain benign prompts" : "look-alikes"} refused, %`;
    choose(value, "tradeoff");
  });
})();
