// What the browser does itself: tables and figures. Everything from data goes in as text, never as HTML.
window.katherine = (() => {
  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // What a component of ui.component.Data shows now: a function, which reads the text only when it is another.
  function data(props) {
    let text;
    let value = null;
    return () => {
      if (props.value !== text) {
        text = props.value;
        value = text ? JSON.parse(text) : null;
      }
      return value;
    };
  }

  // ---------------------------------------------------------------------------------------------- tables
  const thousands = new Intl.NumberFormat("en"); // 1,886, as elsewhere
  const grouped = (value) => (Number.isInteger(value) ? thousands.format(value) : value);
  const shown = (cell) => (cell !== null && typeof cell === "object" ? cell.t : cell);
  const sortKey = (cell) => (cell !== null && typeof cell === "object" && cell.s !== null ? cell.s : shown(cell));

  function cellNode(value, numeric) {
    const cell = make("td", numeric ? "k-number" : "");
    const rich = value !== null && typeof value === "object" ? value : { t: value };
    if (rich.w) cell.title = rich.w;
    if (rich.h) {
      const link = make("a", rich.c ? `k-${rich.c}` : "", rich.t);
      link.href = rich.h;
      if (rich.h.includes("/files/")) link.setAttribute("download", "");
      link.addEventListener("click", (event) => event.stopPropagation());
      cell.append(link);
    } else if (rich.c) {
      cell.append(make("span", `k-tone k-${rich.c}`, rich.t));
    } else {
      cell.textContent = numeric ? grouped(rich.t) : rich.t;
    }
    return cell;
  }

  const BATCH = 60; // rows: two screens of them

  function table(element, props, watch, select) {
    const host = element.querySelector(".k-table");
    const now = data(props);
    const state = { column: null, down: false };
    let drawn = null;

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

    const lineOf = (row, value) => {
      const line = make("tr");
      row.cells.forEach((cell, column) => line.append(cellNode(cell, value.columns[column].endsWith("#"))));
      if (row.id === null) return line;
      line.className = row.id === value.selected ? "k-row k-selected" : "k-row";
      line.tabIndex = 0;
      line.dataset.id = row.id;
      const choose = () => {
        host.querySelectorAll(".k-selected").forEach((other) => other.classList.remove("k-selected"));
        line.classList.add("k-selected");
        value.selected = row.id;
        select(row.id);
      };
      line.addEventListener("click", choose);
      line.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          choose();
        }
      });
      return line;
    };

    let more = () => {};
    host.addEventListener("scroll", () => {
      if (host.scrollTop + host.clientHeight > host.scrollHeight - 600) more();
    });

    const draw = () => {
      const value = now();
      const how = `${state.column} ${state.down}`;
      if (!value || (drawn && drawn.value === value && drawn.how === how)) return;
      drawn = { value, how };
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
      const rows = order(value);
      // Laying out hundreds of rows takes longer than opening a tab may: those further down come when they are near.
      more = () => {
        for (const row of rows.slice(body.childElementCount, body.childElementCount + BATCH)) body.append(lineOf(row, value));
      };
      const before = host.querySelector("tbody")?.childElementCount || 0;
      do more();
      while (body.childElementCount < Math.min(before, rows.length));
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
      // A finger that drags means to scroll the page.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
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
    const now = data(props);
    let drawn = [];
    const draw = () => {
      const value = now();
      empty.textContent = value ? "" : props.empty;
      empty.style.display = value ? "none" : "";
      host.style.display = value ? "" : "none";
      // Hidden in a closed tab there is no width to draw into; it is drawn when the tab opens.
      if (!value || typeof Plotly === "undefined" || !host.offsetParent) return;
      const drawing = [value, host.clientWidth, document.body.classList.contains("dark")];
      if (drawing.every((part, index) => part === drawn[index])) return;
      drawn = drawing;
      const layout = painted(value.layout || {}, props.height, host.clientWidth < 500);
      Plotly.react(host, value.data, layout, { displaylogo: false, responsive: false, scrollZoom: false,
        modeBarButtonsToRemove: ["lasso2d", "select2d"] });
    };
    figures.add(draw);
    watch("value", draw);
    new ResizeObserver(draw).observe(element);
    draw();
  }

  // plotly.js is large and comes beside the page, in no certain order: figures are drawn once it is there.
  const redraw = () => figures.forEach((draw) => draw());
  const awaited = setInterval(() => {
    if (typeof Plotly === "undefined") return;
    clearInterval(awaited);
    redraw();
    new MutationObserver(redraw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }, 100);

  // ---------------------------------------------------------------------------------------------- clocks
  function clock(element, trigger, every) {
    const place = element.closest(".tabitem");
    let running = null;
    const look = () => {
      const inSight = !document.hidden && element.isConnected && (!place || place.offsetParent !== null);
      if (inSight === (running !== null)) return;
      clearInterval(running || undefined);
      running = inSight ? (every && setInterval(() => trigger("tick"), every)) : null;
      if (inSight) trigger("tick");
    };
    document.addEventListener("visibilitychange", look);
    if (place) new ResizeObserver(look).observe(place); // opened, it has a size; closed, none
    look();
  }

  // ---------------------------------------------------------------------------------------------- requests
  // A session that has ended answers 401 to the page's polls: back to the door, and from there to this tab. And an
  // answer that never comes would leave its part of the page waiting for ever; the server itself gives up sooner.
  const fetched = window.fetch;
  window.fetch = async (what, how) => {
    const event = String(what?.url || what).includes("/gradio_api/run/");
    const answer = await fetched(what, event ? { signal: AbortSignal.timeout(40000), ...how } : how);
    if (answer.status === 401 && new URL(answer.url).origin === location.origin) {
      location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
    }
    return answer;
  };

  // ------------------------------------------------------------------------------------------------ tabs
  // The open tab is in the address, so that a reload (Gradio's own after a lost connection included) comes back to it.
  const tabButtons = () => [...document.querySelectorAll("#tabs > .tab-wrapper button")];
  const nameOf = (button) => (button.dataset.tabId || button.textContent.trim()).toLowerCase();

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("#tabs > .tab-wrapper button");
    if (button && nameOf(button)) history.replaceState(null, "", `#${nameOf(button)}`);
  });

  function openTab(name) {
    const button = tabButtons().filter((one) => nameOf(one) === name && !one.closest("[aria-hidden=true]"))[0];
    if (!button) return false;
    if (button.getAttribute("aria-selected") === "true") history.replaceState(null, "", `#${name}`);
    else button.click();
    return true;
  }

  const wanted = decodeURIComponent(location.hash.slice(1));
  if (wanted) {
    const patience = setInterval(() => openTab(wanted) && clearInterval(patience), 100);
    setTimeout(() => clearInterval(patience), 10000);
  }

  return { data, table, figure, redraw, clock, openTab };
})();
window.dispatchEvent(new Event("katherine"));
