// A talk side by side, drawn so that nothing moves while text grows: what is there stays, and only text is added. All
// that people and models wrote goes in as text, never as HTML.
window.katherineTalk = (() => {
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Adds what is new at the end, so that what a person has marked stays marked.
  function write(node, text) {
    const there = node.firstChild;
    if (there && there.nodeType === Node.TEXT_NODE && node.childNodes.length === 1) {
      if (there.data === text) return;
      if (there.data && text.startsWith(there.data)) {
        there.appendData(text.slice(there.data.length));
        return;
      }
    }
    if (node.textContent !== text) node.textContent = text;
  }

  function button(label, act) {
    const node = make("button", "k-act", label);
    node.type = "button";
    node.addEventListener("click", act);
    return node;
  }

  function answerCell(trigger) {
    const parts = {
      name: make("b"),
      state: make("span"),
      text: make("div", "k-text"),
      note: make("p", "k-note"),
      facts: make("p", "k-facts-line k-dim"),
    };
    const column = { id: "" };
    parts.text.dir = "auto"; // a model may answer in a language that is written the other way
    parts.back = button("", () => trigger("retry", { column: column.id }));
    const head = make("header");
    head.append(parts.name, " ", parts.state);
    const node = make("article", "k-answer");
    node.append(head, parts.text, parts.note, parts.back, parts.facts);
    return {
      node,
      show(answer) {
        column.id = answer.column;
        node.setAttribute("aria-label", answer.title);
        node.setAttribute("aria-busy", String(answer.busy));
        write(parts.name, answer.title);
        write(parts.state, answer.words);
        parts.state.className = answer.tone ? `k-tone k-${answer.tone}` : "k-dim";
        write(parts.text, answer.text);
        write(parts.note, answer.note);
        parts.note.className = answer.bad ? "k-note k-bad" : "k-note k-dim";
        parts.note.hidden = !answer.note;
        write(parts.back, answer.back);
        parts.back.hidden = !answer.back;
        write(parts.facts, answer.facts);
      },
    };
  }

  // On a phone a row is swiped to the next column: the other rows follow, so that one reads on with the same model.
  function swiped(answers) {
    const step = answers.firstElementChild?.offsetWidth;
    const box = answers.closest(".k-talk-box");
    if (!step || !box || answers.scrollWidth <= answers.clientWidth) return;
    box.dataset.column = Math.round(answers.scrollLeft / step);
    box.querySelectorAll(".k-answers").forEach(follow);
  }

  function follow(answers) {
    const column = Number(answers.closest(".k-talk-box")?.dataset.column || 0);
    const step = answers.firstElementChild?.offsetWidth;
    if (step && Math.round(answers.scrollLeft / step) !== column) answers.scrollLeft = column * step;
  }

  function roundNode(trigger) {
    const state = { number: 0 };
    const asked = make("div", "k-text");
    asked.dir = "auto";
    const aside = make("span", "k-dim");
    const edit = button("Edit", () => {
      trigger("edit", { round: state.number });
      document.querySelector("#chat-question textarea")?.focus();
    });
    const head = make("div", "k-asked");
    head.append(asked, aside, edit);
    const answers = make("div", "k-answers");
    answers.addEventListener("scrollend", () => swiped(answers));
    const node = make("section", "k-round");
    node.append(head, answers);
    const cells = [];
    return {
      node,
      show(round) {
        state.number = round.number;
        node.setAttribute("aria-label", `Question ${round.number + 1}`);
        write(asked, round.question);
        write(aside, round.aside);
        edit.setAttribute("aria-label", `Edit question ${round.number + 1}`);
        answers.style.setProperty("--k-columns", round.answers.length);
        // Once, when it is new: later a finger may just be swiping it.
        if (!cells.length) requestAnimationFrame(() => follow(answers));
        while (cells.length < round.answers.length) {
          cells.push(answerCell(trigger));
          answers.append(cells[cells.length - 1].node);
        }
        while (cells.length > round.answers.length) cells.pop().node.remove();
        round.answers.forEach((answer, index) => cells[index].show(answer));
      },
    };
  }

  const valueOf = (props) => JSON.parse(props.value || "null"); // of a ui.component.Data

  // value: {talk, rounds: [{number, question, aside, answers: [...]}]}. leads: a question that is new in it is
  // scrolled to the top, once; from there its answers grow downwards.
  function rounds(element, props, watch, trigger, leads) {
    const host = element.querySelector(".k-rounds");
    const shown = [];
    let last = "";
    const draw = () => {
      const value = valueOf(props) || { talk: "", rounds: [] };
      while (shown.length < value.rounds.length) {
        shown.push(roundNode(trigger));
        host.append(shown[shown.length - 1].node);
      }
      while (shown.length > value.rounds.length) shown.pop().node.remove();
      value.rounds.forEach((round, index) => shown[index].show(round));
      const now = value.rounds.length ? `${value.talk} ${value.rounds[0].number} ${value.rounds[0].question}` : "";
      if (leads && now && now !== last) requestAnimationFrame(() => lead(host));
      last = now;
    };
    watch("value", draw);
    draw();
  }

  function lead(host) {
    const box = host.closest(".k-talk-box");
    if (!box || !host.offsetParent) return;
    if (box.scrollHeight > box.clientHeight + 1) {
      box.scrollTop += host.getBoundingClientRect().top - box.getBoundingClientRect().top;
    } else if (host.getBoundingClientRect().top < 0 || host.getBoundingClientRect().top > innerHeight / 2) {
      host.scrollIntoView({ block: "start" }); // on a phone the page itself scrolls
    }
  }

  // The value outlives a reload, in this tab of the browser alone: two tabs may have two talks open.
  function kept(props, watch, trigger, name) {
    watch("value", () => {
      try {
        if (props.value) sessionStorage.setItem(name, props.value);
        else sessionStorage.removeItem(name);
      } catch {
        // A browser that keeps nothing: after a reload the talk is opened from the list.
      }
    });
    try {
      const before = sessionStorage.getItem(name);
      if (before && !props.value) {
        props.value = before;
        trigger("select", {});
      }
    } catch {
      // the same
    }
  }

  // value: {words, columns: [{id, title, words}]}
  function loaded(element, props, watch, trigger) {
    const host = element.querySelector(".k-loaded");
    let drawn = "";
    const draw = () => {
      if (props.value === drawn) return;
      drawn = props.value;
      const value = valueOf(props) || { words: "", columns: [] };
      const list = make("ul");
      for (const column of value.columns) {
        const item = make("li");
        const unload = button("Unload", () => trigger("select", { id: column.id }));
        unload.setAttribute("aria-label", `Unload ${column.title}`);
        item.append(make("b", "", column.title), " ", make("span", "k-dim", column.words), " ", unload);
        list.append(item);
      }
      host.replaceChildren(make("span", "", value.words), list);
    };
    watch("value", draw);
    draw();
  }

  // Enter while an input method is composing chooses a word; it does not send.
  addEventListener(
    "keydown",
    (event) => {
      if (event.key === "Enter" && event.isComposing && event.target.closest?.("#chat-question")) event.stopPropagation();
    },
    true,
  );

  return { rounds, kept, loaded };
})();
window.dispatchEvent(new Event("katherineTalk"));
