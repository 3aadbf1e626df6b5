// What the browser makes of the page: fails are listed, nothing is changed.
(() => {
  const rgb = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m); return (x + 0.05) / (y + 0.05); };
  const behind = (e) => {
    for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length && c[3] !== 0) return c; }
    return [255, 255, 255];
  };
  const faint = [];
  let texts = 0;
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const style = getComputedStyle(e);
    if (!own || style.display === "none" || ["STYLE", "SCRIPT"].includes(e.tagName.toUpperCase())) continue;
    const inChart = e.closest("svg");
    const colour = inChart ? style.fill : style.color;
    // letters inside a heat map's cell are black or white, chosen by the cell's colour
    if (inChart && ["rgb(0, 0, 0)", "rgb(255, 255, 255)"].includes(colour)) continue;
    texts += 1;
    if (ratio(rgb(colour), behind(inChart ? inChart.parentElement : e)) < 4.5) faint.push(`${e.tagName} ${colour} ${e.textContent.slice(0, 40)}`);
  }
  const charts = [...document.querySelectorAll("figure svg")].map((s) => ({
    label: s.getAttribute("aria-label") || "", width: s.getBoundingClientRect().width, height: s.getBoundingClientRect().height,
    drawn: s.querySelectorAll("path").length }));
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  const asked = [...document.querySelectorAll("use")].map((u) => u.href.baseVal.slice(1));
  return { texts, faint: faint.slice(0, 5), charts, repeated: ids.filter((id, i) => ids.indexOf(id) !== i && ids.length < 5000),
    unresolved: asked.filter((id) => !document.getElementById(id)).length,
    over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    headless: [...document.querySelectorAll("table")].filter((t) => !t.querySelector("thead th[scope=col]")).length,
    background: getComputedStyle(document.body).backgroundColor };
})()
