// What the browser does itself: tables and figures. Everything from data goes in as text, never as HTML.
window.katherine = (() => {
  const dark = () => document.body.classList.contains("dark");
  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // ---------------------------------------------------------------------------------------------- tables
  const shown = (cell) => (cell !== null && typeof cell === "object" ? cell.t : cell);
  const sortKey = (cell) => (cell !== null && typeof cell === "object" && cell.s !== null ? cell.s : shown(cell));

  function cellNode(value, numeric) {
    const cell = make("td", numeric ? "k-number" : "");
    const rich = value !== null && typeof value === "object" ? value : { t: value };
    if (rich.h) {
      const link = make("a", rich.c ? `k-${rich.c}` : "", rich.t);
      link.href = rich.h;
      if (rich.h.includes("/files/")) link.setAttribute("download", "");
      link.addEventListener("click", (event) => event.stopPropagation());
      cell.append(link);
    } else if (rich.c) {
      cell.append(make("span", `k-tone k-${rich.c}`, rich.t));
    } else {
      cell.textContent = rich.t;
    }
    return cell;
  }

  function table(element, props, watch, select) {
    const host = element.querySelector(".k-table");
    const state = { column: null, down: false };
    let drawn = "";

    const order = (value) => {
      const rows = value.rows.map((cells, index) => ({ cells, id: value.ids ? value.ids[index] : null, index }));
      if (state.column === null) return rows;
      const direction = state.down ? -1 : 1;
      return rows.sort((a, b) => {
        const x = sortKey(a.cells[state.column]);
        const y = sortKey(b.cells[state.column]);
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last, either way
        if (typeof x === "number" && typeof y === "number") return direction * (x - y);
        return direction * String(x).localeCompare(String(y), undefined, { numeric: true });
      });
    };

    const draw = () => {
      const value = props.value;
      const now = JSON.stringify([value, state]);
      if (!value || now === drawn) return;
      drawn = now;
      if (!value.rows.length) {
        host.replaceChildren(make("p", "k-empty", value.empty));
        return;
      }
      const numeric = value.columns.map((label) => label.endsWith("#"));
      const head = make("tr");
      value.columns.forEach((label, column) => {
        const cell = make("th", numeric[column] ? "k-number" : "");
        cell.scope = "col";
        const button = make("button", "", label.replace(/#$/, ""));
        button.type = "button";
        if (state.column === column) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        button.addEventListener("click", () => {
          state.down = state.column === column ? !state.down : numeric[column];
          state.column = column;
          draw();
        });
        cell.append(button);
        head.append(cell);
      });
      const body = make("tbody");
      for (const row of order(value)) {
        const line = make("tr");
        row.cells.forEach((cell, column) => line.append(cellNode(cell, numeric[column])));
        if (row.id !== null) {
          line.className = row.id === value.selected ? "k-row k-selected" : "k-row";
          line.tabIndex = 0;
          line.dataset.id = row.id;
          const choose = () => {
            host.querySelectorAll(".k-selected").forEach((other) => other.classList.remove("k-selected"));
            line.classList.add("k-selected");
            select(row.id);
          };
          line.addEventListener("click", choose);
          line.addEventListener("keydown", (event) => {
            if (event.key === "Enter" || event.key === " ") {
              event.preventDefault();
              choose();
            }
          });
        }
        body.append(line);
      }
      const whole = make("table");
      const top = make("thead");
      top.append(head);
      whole.append(top, body);
      const scroll = host.scrollTop;
      const focused = host.contains(document.activeElement) ? document.activeElement.dataset.id : undefined;
      host.replaceChildren(whole);
      host.scrollTop = scroll;
      if (focused) host.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
    };
    watch("value", draw);
    draw();
  }

  // --------------------------------------------------------------------------------------------- figures
  const figures = new Set();

  function painted(layout, height, narrow) {
    const grid = { gridcolor: css("--border-color-primary"), zerolinecolor: css("--border-color-primary") };
    const axes = {};
    for (const name of ["xaxis", "yaxis", "yaxis2"]) if (layout[name] || name !== "yaxis2") axes[name] = { ...grid, ...layout[name] };
    return {
      margin: { l: 52, r: 12, t: layout.title ? 34 : 12, b: 36 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 10 : 12 } },
      hovermode: narrow ? "closest" : "x unified",
      dragmode: narrow ? false : "zoom",
      ...layout,
      ...axes,
      height,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font"), size: 12, color: css("--body-text-color") },
      hoverlabel: { bgcolor: css("--background-fill-primary"), font: { color: css("--body-text-color") } },
    };
  }

  function figure(element, props, watch) {
    const host = element.querySelector(".k-plot");
    const empty = element.querySelector(".k-empty");
    host.style.minHeight = `${props.height}px`;
    const draw = () => {
      const value = props.value;
      empty.textContent = value ? "" : props.empty;
      empty.style.display = value ? "none" : "";
      host.style.display = value ? "" : "none";
      // Hidden in a closed tab there is no width to draw into; it is drawn when the tab opens.
      if (!value || typeof Plotly === "undefined" || !host.offsetParent) return;
      const layout = painted(value.layout || {}, props.height, host.clientWidth < 500);
      Plotly.react(host, value.data, layout, { displaylogo: false, responsive: false, scrollZoom: false,
        modeBarButtonsToRemove: ["lasso2d", "select2d"] });
    };
    figures.add(draw);
    watch("value", draw);
    new ResizeObserver(draw).observe(element);
    draw();
  }

  // plotly.js is large: it loads beside the page, and figures are drawn when it has come.
  const redraw = () => figures.forEach((draw) => draw());
  window.addEventListener("load", redraw);
  document.addEventListener("DOMContentLoaded", () => {
    new MutationObserver(redraw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    document.getElementById("katherine-plotly")?.addEventListener("load", redraw);
  });

  return { table, figure, dark, redraw };
})();
