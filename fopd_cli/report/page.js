"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("data").textContent);
  const grid = document.getElementById("charts");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (s) => css("--c" + (s.colour % 6));
  const minutes = (t) => (t >= 120 ? +(t / 60).toFixed(1) + " h" : +t.toFixed(1) + " min");
  const short = (v) => String(+v.toPrecision(3));
  const number = (v) => {
    const size = Math.abs(v);
    if (v === 0) return "0";
    if (size >= 1e9 || size < 1e-3) return v.toExponential(1);
    return size >= 1e6 ? short(v / 1e6) + "M" : size >= 1e4 ? short(v / 1e3) + "k" : short(v);
  };
  let axis = "x", logarithmic = false;
  let plots = [];

  // A standard error is a bar through its point.
  const errors = (series) => (u) => {
    const { ctx } = u, ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    ctx.lineWidth = 1.3 * ratio;
    series.forEach((s, i) => {
      if (!u.series[i + 1].show) return;
      ctx.strokeStyle = colour(s);
      s.y.forEach((y, k) => {
        if (s.e[k] == null || y == null) return;
        const x = u.valToPos(s[axis][k], "x", true), cap = 3 * ratio;
        const low = u.valToPos(Math.max(y - s.e[k], u.scales.y.min), "y", true), high = u.valToPos(y + s.e[k], "y", true);
        ctx.beginPath();
        ctx.moveTo(x, low); ctx.lineTo(x, high);
        ctx.moveTo(x - cap, low); ctx.lineTo(x + cap, low);
        ctx.moveTo(x - cap, high); ctx.lineTo(x + cap, high);
        ctx.stroke();
      });
    });
    ctx.restore();
  };

  // From the points alone, bars included; a little air above and below.
  const range = (series, log) => (u) => {
    let low = Infinity, high = -Infinity;
    series.forEach((s, i) => {
      if (!u.series[i + 1].show) return;
      s.y.forEach((y, k) => {
        if (y == null) return;
        low = Math.min(low, log ? y : y - (s.e[k] || 0));
        high = Math.max(high, y + (s.e[k] || 0));
      });
    });
    if (log) return low > high ? [0.1, 1] : [low / 1.2, high * 1.2];
    if (low > high) return [0, 1];
    if (low > 0 && low < 0.5 * high) low = 0;
    const air = (high - low || Math.abs(high) || 1) * 0.06;
    return [low === 0 ? 0 : low - air, high + air];
  };

  const draw = () => {
    plots.forEach((p) => p.destroy());
    plots = charts.map((chart, n) => {
      const card = grid.children[n];
      const data = uPlot.join(chart.series.map((s) => [s[axis], s.y]));
      const log = logarithmic && chart.log;
      const line = { stroke: () => css("--line"), width: 1, size: 4 };
      const look = { stroke: () => css("--faint"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: line, font: "11px system-ui, sans-serif" };
      return new uPlot({
        width: card.clientWidth - 24, height: 210,
        scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: range(chart.series, log) } },
        axes: [
          { ...look, size: 30, values: axis === "t" ? (u, v) => v.map(minutes) : undefined },
          { ...look, size: 52, values: (u, v) => v.map((x) => (x == null ? "" : number(x))) },
        ],
        series: [
          { label: axis === "t" ? "time" : "step", value: (u, v) => (v == null ? "–" : axis === "t" ? minutes(v) : String(Math.round(v))) },
          ...chart.series.map((s) => ({
            label: s.label, stroke: () => colour(s), width: s.faint ? 1 : 2, spanGaps: true,
            dash: s.faint ? [4, 3] : undefined, alpha: s.faint ? 0.75 : 1,
            points: { show: s.dots, size: 6, fill: () => colour(s) },
            value: (u, v) => (v == null ? "–" : number(v)),
          })),
        ],
        cursor: { drag: { x: true, y: false }, points: { size: 7 } },
        hooks: { draw: [errors(chart.series)] },
      }, data, card);
    });
  };

  charts.forEach((chart) => {
    const card = document.createElement("div");
    const title = document.createElement("h3"), note = document.createElement("p");
    title.textContent = chart.title + (chart.unit ? ", " + chart.unit : "");
    note.textContent = chart.note;
    card.append(title, note);
    grid.append(card);
  });
  draw();

  const bar = document.getElementById("axis");
  bar.hidden = charts.length === 0;
  const axes = bar.querySelectorAll("[data-x]");
  axes.forEach((button) => button.addEventListener("click", () => {
    axis = button.dataset.x;
    axes.forEach((b) => b.classList.toggle("on", b === button));
    draw();
  }));
  document.getElementById("log").addEventListener("click", (event) => {
    logarithmic = !logarithmic;
    event.target.classList.toggle("on", logarithmic);
    draw();
  });
  // A phone has no pointer to hold on a token: a tap tells the same.
  const told = document.getElementById("told");
  addEventListener("click", (event) => {
    const token = event.target.closest(".answers [title]");
    told.hidden = !token;
    if (token) told.textContent = JSON.stringify(token.textContent) + ": " + token.title;
  });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.documentElement.dataset.drawn = String(plots.length);

  if (WATCHING) {
    let known = null;
    setInterval(async () => {
      try {
        const news = await (await fetch("news")).text();
        if (known !== null && news !== known) location.reload();
        known = news;
      } catch { /* the command was stopped: what stands here stays */ }
    }, 2000);
  }
})();
