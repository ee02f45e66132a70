// The reviewer's page, drawn from what the server says of it. Everything from data goes in as text, never as HTML.
//
// What is tapped goes into an outbox, which the browser keeps until the server has said that it is saved: nothing is lost
// when the page is loaded again, the connection goes, or the panel starts anew.
window.katherineReview = (() => {
  const KEPT = "katherine-review";
  // After this long without an answer, in milliseconds, the same is sent again: a phone in a tunnel answers late.
  const PATIENCE = 8000;
  // Typing rests this long before it is saved.
  const REST = 900;
  const NEVER_LATER = new Set(["mark", "recommend"]);

  // ---------------------------------------------------------------------------------------------- what the browser keeps
  let kept = { name: "", session: "", at: null, outbox: [], drafts: {} };
  try {
    kept = { ...kept, ...JSON.parse(localStorage.getItem(KEPT) || "{}") };
  } catch {
    // Without storage (a private window) the page works, but forgets when it is closed.
  }
  const keep = () => {
    try {
      localStorage.setItem(KEPT, JSON.stringify({ ...kept, outbox: kept.outbox.filter((act) => NEVER_LATER.has(act.do)) }));
    } catch {
      // as above
    }
  };

  // ---------------------------------------------------------------------------------------------------------- elements
  function make(tag, given = {}, ...inside) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, heard] of Object.entries(value)) node.addEventListener(event, heard);
      else if (name === "text") node.textContent = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...inside.filter((each) => each !== null));
    return node;
  }
  // Drawn, since not every machine has the letters for it.
  function thumbSign(down) {
    const within = "http://www.w3.org/2000/svg";
    const sign = document.createElementNS(within, "svg");
    sign.setAttribute("viewBox", "0 0 24 24");
    sign.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(within, "path");
    path.setAttribute("d", "M3 10.5h4v10H3zM7 11.5l4.2-8.3c1.6 0 2.7 1.2 2.5 2.8L13.2 9.5h5.6c1.3 0 2.3 1.2 2 2.5l-1.6 7c-.2.9-1 1.5-1.9 1.5H7");
    if (down) path.setAttribute("transform", "rotate(180 12 12)");
    sign.append(path);
    return sign;
  }
  const button = (words, click, given = {}) => make("button", { type: "button", class: "r-button", text: words, on: { click }, ...given });
  const say = (node, words) => {
    if (node.textContent !== words) node.textContent = words;
  };
  const show = (node, shown) => {
    if (node.hidden === shown) node.hidden = !shown;
  };

  const day = (iso) => new Date(iso).toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric" });
  const clock = (iso) => new Date(iso).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const minutes = (seconds) => (seconds < 90 ? "a minute" : `${Math.round(seconds / 60)} minutes`);
  const listed = (letters) => (letters.length < 2 ? letters.join("") : `${letters.slice(0, -1).join(", ")} and ${letters.at(-1)}`);

  // ------------------------------------------------------------------------------------------------------- sending
  let send = () => {};
  let number = 0;
  let flying = null; // the act whose answer is awaited
  let since = 0;
  let state = null;
  let root, alertBox, lostBox, noticeBox, stage;
  let drawn = ""; // which screen is on the page
  let patch = () => {};

  function act(what, given = {}) {
    const one = { id: (number += 1), do: what, session: kept.session, ...here(), ...given };
    if (!NEVER_LATER.has(what)) kept.outbox = kept.outbox.filter((each) => NEVER_LATER.has(each.do) || each === flying);
    // Of one thing that is said twice before it is sent, the last counts.
    const same = (each) => each !== flying && each.do === "mark" && one.do === "mark" && what_of(each) === what_of(one);
    kept.outbox = [...kept.outbox.filter((each) => !same(each)), one];
    keep();
    next();
  }
  const part_of = (one) => ["thumb", "note", "rewrite", "chosen"].find((name) => one[name] !== undefined);
  const what_of = (one) => JSON.stringify([one.session, one.course, one.at, one.round, one.letter || "", part_of(one)]);
  const here = () => {
    if (!state) return {};
    const place = state.screen === "question" || state.screen === "talk";
    return { screen: state.screen, ...(place ? { course: state.course, at: state.at } : {}) };
  };

  function next() {
    if (flying || !kept.outbox.length) return;
    // First what was said, then where to go: the next screen shows it.
    flying = kept.outbox[0];
    since = Date.now();
    send(flying);
  }

  setInterval(() => {
    if (flying && Date.now() - since > PATIENCE) {
      show(lostBox, true);
      since = Date.now();
      send(flying);
    }
    // The tick that was to bring the last words may have been lost.
    if (!flying && state?.scene?.state === "coming" && Date.now() - heard > 3 * PATIENCE) {
      heard = Date.now();
      act("look");
    }
  }, 500);
  addEventListener("online", () => flying && ((since = Date.now()), send(flying)));
  let heard = Date.now();

  function receive(value) {
    if (!value || !flying || value.heard !== flying.id) return;
    heard = Date.now();
    show(lostBox, false);
    const done = flying;
    flying = null;
    kept.outbox = kept.outbox.filter((each) => each !== done);
    if (!value.error && done.do === "mark") forget(done);
    if (!value.error && done.do === "recommend") thanked = true;
    if (value.stay);
    else if (value.session) Object.assign(kept, { session: value.session, name: value.name });
    else if (value.screen === "welcome") kept.session = "";
    complain(value.error);
    // What waits to be sent stands on the page already; an answer to what was said before would take it back.
    const more = kept.outbox.some((each) => !NEVER_LATER.has(each.do));
    if (!more && !value.stay) {
      state = value;
      kept.at = value.screen === "welcome" ? null : here();
      draw();
    }
    keep();
    next();
  }

  function complain(words) {
    say(alertBox, words || "");
    show(alertBox, Boolean(words));
    if (words) alertBox.scrollIntoView({ block: "nearest" });
  }

  // Of what is typed and not saved yet, by where it was typed.
  const drafted = (round, letter, field) => what_of({ session: kept.session, ...here(), round, letter, [field]: "" });
  function forget(done) {
    const field = part_of(done);
    const key = what_of({ ...done, [field]: "" });
    if (kept.drafts[key] === done[field]) delete kept.drafts[key];
  }

  // -------------------------------------------------------------------------------------------------------- screens
  function draw() {
    const now = JSON.stringify([state.screen, state.course, state.at, state.session]);
    if (now === drawn) {
      patch();
      return;
    }
    const first = drawn === "";
    drawn = now;
    const screen = { welcome, choose, question, talk, verdict }[state.screen]();
    stage.replaceChildren(...screen);
    patch();
    scrollTo(0, 0);
    const title = stage.querySelector("h1");
    if (title && !first) title.focus({ preventScroll: true });
    if (!returning) history[first ? "replaceState" : "pushState"]({ review: here() }, "");
    returning = false;
  }
  let returning = false;
  let thanked = false;
  addEventListener("popstate", (event) => {
    const to = event.state?.review;
    if (!to || !state?.session) return;
    returning = true;
    if (to.screen === "question" || to.screen === "talk") act("go", to);
    else act(to.screen === "verdict" ? "verdict" : "choose");
  });

  const heading = (words) => make("h1", { tabindex: "-1", text: words });
  const top = () =>
    make(
      "nav",
      { class: "r-top", "aria-label": "Pages" },
      button("‹ Overview", () => act("choose"), { class: "r-link" }),
      button("My recommendation", () => act("verdict"), { class: "r-link" }),
    );

  function welcome() {
    if (!state.versions.length) {
      patch = () => {};
      return [
        heading("Nothing to review yet"),
        make("p", { text: "There is nothing to read yet. Whoever asked you here will tell you when there is." }),
        button("Look again", () => act("open", { screen: "welcome" })),
      ];
    }
    const name = make("input", {
      id: "r-name", type: "text", autocomplete: "name", maxlength: "60", required: true, value: kept.name, "aria-describedby": "r-why",
    });
    const days = state.versions.map((each) => day(each.made));
    const labels = state.versions.map((each, place) =>
      days.filter((one) => one === days[place]).length > 1 ? `${days[place]}, ${clock(each.made)}` : days[place],
    );
    const version = make(
      "select",
      { id: "r-version" },
      ...state.versions.map((each, place) => make("option", { value: each.key, text: `${labels[place]}${place ? "" : " (newest)"}` })),
    );
    const form = make(
      "form",
      {
        class: "r-form",
        novalidate: true,
        on: {
          submit: (event) => {
            event.preventDefault();
            if (!name.value.trim()) {
              complain("Please type your name first.");
              name.focus();
              return;
            }
            act("start", { name: name.value, version: version.value });
          },
        },
      },
      make("label", { for: "r-name", text: "Your name" }),
      name,
      make("p", { id: "r-why", class: "r-hint", text: "Under the same name you can go on later, on another phone or computer too." }),
      ...(state.versions.length > 1 ? [make("label", { for: "r-version", text: "Which one, by the day it was made" }), version] : []),
      make("button", { type: "submit", class: "r-button r-main", text: "Start" }),
    );
    patch = () => {};
    return [
      heading("Which answers sound right?"),
      make("p", { text:
        "You will see a question and a few answers to it, given by versions that differ a little. Say which one is best, and " +
        "what is good or bad about each: there are no wrong replies. Which version is which is hidden on purpose, so that " +
        "only the answers count." }),
      form,
    ];
  }

  function choose() {
    const cards = state.offers.map((offer) => {
      const going = offer.is_begun ? `${offer.judged} of ${offer.questions} answered` : `${offer.questions} questions`;
      return make(
        "li",
        {},
        make(
          "button",
          { type: "button", class: "r-choice", on: { click: () => act("go", { course: offer.name, at: null }) } },
          make("strong", { text: offer.is_begun ? `Go on with the questions “${offer.name}”` : `Answer the questions “${offer.name}”` }),
          make("span", { text: going }),
          offer.is_begun ? make("progress", { max: offer.questions, value: offer.judged, "aria-hidden": "true" }) : null,
          offer.description && !offer.is_begun ? make("span", { class: "r-hint", text: offer.description }) : null,
        ),
      );
    });
    const free = make(
      "li",
      {},
      make(
        "button",
        { type: "button", class: "r-choice", on: { click: () => act("go", { course: "", at: null }) } },
        make("strong", { text: state.talks ? "Go on talking freely" : "Talk freely" }),
        make("span", { text: "Ask what you like, and go on from the answers." }),
      ),
    );
    const last = make(
      "li",
      {},
      make(
        "button",
        { type: "button", class: "r-choice", on: { click: () => act("verdict") } },
        make("strong", { text: "Give your recommendation" }),
        make("span", { text: "Would you let this go out? You can say so at any time, and change it later." }),
      ),
    );
    patch = () => {};
    return [
      heading(`Hello, ${state.name}`),
      make("p", { text: "What would you like to do? Everything you tap is saved at once, so you can stop whenever you like." }),
      make("ul", { class: "r-choices" }, ...cards, free, last),
      make("div", { class: "r-row" }, button("Start page (another name or version)", () => leave(), { class: "r-link" }), logOut()),
    ];
  }

  // A page of its own, which asks once more: for a telephone that somebody else uses as well.
  const logOut = () => make("a", { href: "/logout", class: "r-link", text: "Log out" });

  function leave() {
    kept.session = "";
    keep();
    act("open", { session: "", screen: "welcome" });
  }

  // ------------------------------------------------------------------------------------------------- answers and marks
  const PROMISES = {
    cut: "It would have gone on: it was cut off here.",
    stopped: "It was stopped here.",
  };

  // What was said and is not saved yet counts as said.
  function pending(round, letter, field, saved) {
    const waiting = kept.outbox.filter((each) => each.do === "mark" && each.session === kept.session && each[field] !== undefined);
    const mine = waiting.filter((each) => what_of(each) === what_of({ session: kept.session, ...here(), round, letter, [field]: "" }));
    return mine.length ? mine.at(-1)[field] : saved;
  }

  function card(round, letter, judged) {
    const text = make("p", { class: "r-text" });
    const remark = make("p", { class: "r-remark" });
    const again = button("Try this one again", () => act("retry", { letter }), { class: "r-button r-small" });
    const dots = make("span", { class: "r-dots", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
    const whole = make("article", { class: "r-card", "aria-labelledby": `r-${round}-${letter}` },
      make("h2", { id: `r-${round}-${letter}`, text: `Answer ${letter}` }), text, dots, remark, again);
    let marks = () => {};
    if (judged) {
      const thumb = (value, words, sign) => {
        const one = make(
          "button",
          { type: "button", class: "r-thumb", "aria-label": `Answer ${letter}: ${words}`, on: { click: () => {
            const now = one.getAttribute("aria-pressed") === "true" ? 0 : value;
            act("mark", { round, letter, thumb: now });
            patch();
          } } },
          sign,
          make("span", { text: words }),
        );
        return one;
      };
      const right = state.scene.for_person;
      const up = thumb(1, right ? "Right" : "Good", thumbSign(false));
      const down = thumb(-1, right ? "Not right" : "Not good", thumbSign(true));
      const note = typed(round, letter, "note", `Note on answer ${letter}`, "What is good or bad about it?", 2000);
      const rewrite = typed(round, letter, "rewrite", `Instead of answer ${letter}, I would rather have it say …`, "", 8000);
      const words = button("Begin with its own words", () => rewrite.fill(text.textContent), { class: "r-link" });
      rewrite.box.append(words);
      const controls = make("div", { class: "r-marks" },
        make("div", { class: "r-row", role: "group", "aria-label": right ? `Was answer ${letter} right?` : `Answer ${letter}` }, up, down),
        make("div", { class: "r-row r-words" }, note.opener("Add a note", "Your note"), rewrite.opener("I would rather have it say …", "Your wording")),
        note.box, rewrite.box);
      whole.append(controls);
      marks = (face) => {
        const there = state.scene.state === "there" || round < state.scene.turns.length - 1;
        show(controls, there && face.state !== "coming" && face.text !== "");
        const value = pending(round, letter, "thumb", face.mark.thumb);
        up.setAttribute("aria-pressed", String(value === 1));
        down.setAttribute("aria-pressed", String(value === -1));
        note.patch(face.mark.note);
        rewrite.patch(face.mark.rewrite);
        show(words, !rewrite.value() && face.text !== "");
      };
    }
    return {
      whole,
      patch: (face) => {
        say(text, face.text);
        show(text, face.text !== "" || face.state === "coming");
        show(dots, face.state === "coming");
        whole.classList.toggle("r-coming", face.state === "coming");
        const silent = face.state !== "coming" && !face.text;
        say(remark, silent ? "No answer came from this one." : PROMISES[face.state] || "");
        show(remark, remark.textContent !== "");
        show(again, silent && round === state.scene.turns.length - 1);
        marks(face);
      },
    };
  }

  let drawers = 0;
  // A text of one's own about an answer: kept in the browser with each letter, saved when typing rests.
  function typed(round, letter, field, label, hint, longest) {
    const id = `r-typed-${(drawers += 1)}`;
    const key = drafted(round, letter, field);
    const area = make("textarea", { id, rows: "3", maxlength: longest, placeholder: hint });
    const box = make("div", { class: "r-typed", hidden: true }, make("label", { for: id, text: label }), area);
    let timer = 0;
    let saved = "";
    const save = () => {
      clearTimeout(timer);
      if (kept.drafts[key] === undefined || area.value === pending(round, letter, field, saved)) return;
      act("mark", { round, letter, [field]: area.value, ...JSON.parse(placeOf) });
    };
    // Where it was typed, not where the reader has gone by the time that it is saved.
    const placeOf = JSON.stringify(here());
    area.addEventListener("input", () => {
      kept.drafts[key] = area.value;
      keep();
      clearTimeout(timer);
      timer = setTimeout(save, REST);
      opened?.update();
    });
    area.addEventListener("blur", save);
    let opened = null;
    return {
      box,
      value: () => area.value,
      fill: (words) => {
        area.value = words;
        area.dispatchEvent(new Event("input"));
        area.focus();
      },
      opener: (empty, full) => {
        const one = button(empty, () => {
          box.hidden = !box.hidden;
          one.setAttribute("aria-expanded", String(!box.hidden));
          if (!box.hidden) area.focus();
        }, { class: "r-link", "aria-expanded": "false", "aria-controls": id });
        opened = {
          update: () => {
            say(one, area.value ? `${full} ✓` : empty);
          },
        };
        return one;
      },
      patch: (value) => {
        saved = value;
        const now = kept.drafts[key] ?? pending(round, letter, field, value);
        if (document.activeElement !== area && area.value !== now) area.value = now;
        if (now && kept.drafts[key] !== undefined && !timer) timer = setTimeout(save, REST); // left over from before a reload
        opened?.update();
      },
    };
  }

  // A question and its answers. judged: whether anything can be said of them.
  function turnOf(round, judged) {
    const asked = make("p", { class: "r-asked" });
    const cards = make("div", { class: "r-cards" });
    const whole = make("section", { class: "r-turn", "aria-label": `Question ${round + 1} of this talk` },
      make("div", { class: "r-question" }, make("span", { class: "r-hidden", text: "Question: " }), asked), cards);
    const parts = new Map();
    return {
      whole,
      patch: (turn) => {
        say(asked, turn.question);
        for (const face of turn.faces) {
          if (!parts.has(face.letter)) {
            const one = card(round, face.letter, judged);
            parts.set(face.letter, one);
            cards.append(one.whole);
          }
          parts.get(face.letter).patch(face);
        }
      },
    };
  }

  // Which is better, of the last question.
  function better() {
    const title = make("legend", {});
    const field = make("fieldset", { class: "r-better" }, title);
    const chips = make("div", { class: "r-chips" });
    field.append(chips);
    let letters = "";
    const name = `r-better-${(drawers += 1)}`;
    let round = 0;
    const chip = (value, words, label) => {
      const input = make("input", { type: "radio", name, value, "aria-label": label });
      input.addEventListener("change", () => act("mark", { round, chosen: value }));
      // Tapped again, it is taken back.
      input.addEventListener("pointerdown", () => (input.wasChecked = input.checked));
      input.addEventListener("click", () => {
        if (!input.wasChecked) return;
        input.wasChecked = false;
        input.checked = false;
        act("mark", { round, chosen: "" });
      });
      return make("label", { class: value.length > 1 ? "r-chip r-wide" : "r-chip" }, input, make("span", { "aria-hidden": "true", text: words }));
    };
    return {
      whole: field,
      patch: (turn, there) => {
        round = state.scene.turns.length - 1;
        const came = turn ? turn.faces.filter((face) => face.text).map((face) => face.letter) : [];
        show(field, there && came.length > 1);
        if (!there) return;
        if (came.join("") !== letters) {
          letters = came.join("");
          const most = came.length > 2 ? "best" : "better";
          say(title, `Which is ${most}?`);
          chips.replaceChildren(
            ...came.map((letter) => chip(letter, letter, `Answer ${letter} is ${most}`)),
            chip("same", "About the same", "They are about the same"),
            chip("none", "None is good", "None of them is good"),
          );
        }
        const chosen = pending(round, "", "chosen", turn.choice);
        chips.querySelectorAll("input").forEach((input) => (input.checked = input.value === chosen));
      },
    };
  }

  const partly = (came, silent) =>
    `${came.length > 1 ? "Answers" : "Answer"} ${listed(came)} ${came.length > 1 ? "are" : "is"} there. From ${listed(silent)} nothing came: ` +
    "you can try again there, or go by the others.";

  // Where the answers are, and what can be done where they do not come. `busy` goes above the answers, since whoever waits
  // looks at the top of the page; the rest below them, where nothing moves away from under a thumb.
  function progress() {
    const line = make("p", { class: "r-status", role: "status", "aria-live": "polite" });
    const busy = make("p", { class: "r-busy" });
    const again = button("Get the answers again", () => act("ask"));
    const old = button("Read recorded answers instead", () => act("recorded"));
    const stop = button("That is enough", () => act("stop"), { class: "r-link" });
    const rows = make("div", { class: "r-row" }, again, old, stop);
    return {
      busy,
      whole: make("div", { class: "r-progress" }, line, rows),
      patch: (scene) => {
        const last = scene.turns.at(-1);
        const came = last ? last.faces.filter((face) => face.text).map((face) => face.letter) : [];
        const silent = last ? last.faces.filter((face) => !face.text).map((face) => face.letter) : [];
        const begun = scene.state === "coming" && came.length > 0;
        const words = {
          new: "",
          coming: begun ? "The answers are coming …" : "The answers are on their way. They all begin at the same time.",
          there: silent.length ? partly(came, silent) : came.length > 1 ? `All answers are there: ${listed(came)}.` : "The answer is there.",
          broken: "The answers did not all come: this page was closed, or something went wrong.",
        }[scene.state];
        say(line, scene.busy && scene.state === "coming" ? "" : words);
        show(line, line.textContent !== "" || scene.state === "there");
        const until = scene.busy && scene.busy.until;
        say(busy, scene.busy
          ? "The machine is busy with other work just now. " +
            (until ? `It will be free at about ${clock(until)}, or a little later. ` : "How long for is not known yet: look in again in half an hour. ") +
            "Leave this page open and the answers come by themselves, or come back then: your place is kept."
          : "");
        show(busy, Boolean(scene.busy));
        const cut = last && last.faces.some((face) => face.state === "stopped");
        show(again, scene.state === "broken" || (scene.state === "there" && cut) || (scene.state === "new" && scene.asks !== ""));
        show(old, scene.recorded);
        show(stop, begun);
        show(rows, !again.hidden || !old.hidden || !stop.hidden);
      },
    };
  }

  function question() {
    const of = state.of;
    const at = state.at;
    const bar = make("progress", { max: of, value: at + 1, "aria-hidden": "true" });
    const earlier = make("details", { class: "r-earlier", hidden: true }, make("summary", { text: "What was said before" }));
    const person = make("p", { class: "r-person" });
    const current = make("div", {});
    const status = progress();
    const choice = better();
    const turns = [];
    const goto = (to) => act("go", { course: state.course, at: to });
    const back = button("Back", () => goto(at - 1), { disabled: at === 0 });
    const onward = button("Skip", () => (at + 1 < of ? goto(at + 1) : act("verdict")), { class: "r-button r-main" });
    const asks = make("div", { class: "r-question" }, make("p", { class: "r-asked" }));
    patch = () => {
      const scene = state.scene;
      const several = scene.turns_of > 1;
      say(asks.firstChild, scene.asks);
      show(asks, scene.turns.length === 0);
      scene.turns.forEach((turn, round) => {
        const last = round === scene.turns.length - 1;
        if (!turns[round]) turns[round] = turnOf(round, round === scene.turns_of - 1);
        turns[round].patch(turn);
        const place = last ? current : earlier;
        if (turns[round].whole.parentNode !== place) place.append(turns[round].whole);
      });
      show(earlier, scene.turns.length > 1);
      const there = scene.state === "there";
      // From the start and to the end, so that nothing moves when the answers come.
      say(person, [several ? `A short talk of ${scene.turns_of} questions: you judge the last answers.` : "",
        scene.for_person ? "Which answers are right? Nobody can tell but you." : ""].filter(Boolean).join(" "));
      show(person, person.textContent !== "");
      status.patch(scene);
      const last = scene.turns.at(-1);
      choice.patch(last, there);
      const said = there && (pending(scene.turns.length - 1, "", "chosen", last.choice) !== "" ||
        last.faces.some((face) => pending(scene.turns.length - 1, face.letter, "thumb", face.mark.thumb) !== 0 ||
          pending(scene.turns.length - 1, face.letter, "note", face.mark.note) || pending(scene.turns.length - 1, face.letter, "rewrite", face.mark.rewrite)));
      say(onward, at + 1 === of ? "Finish" : said ? "Next" : "Skip");
    };
    return [
      top(),
      make("div", { class: "r-head" }, heading(`Question ${at + 1} of ${of}`), bar),
      status.busy, person, earlier, asks, current, status.whole,
      make("div", { class: "r-foot" }, choice.whole, make("div", { class: "r-row r-moves" }, back, onward)),
    ];
  }

  function talk() {
    const at = state.at;
    const turns = [];
    let drawnOnce = false;
    const said = make("div", {});
    const status = progress();
    const choice = better();
    const area = make("textarea", { id: "r-say", rows: "2", maxlength: "4000", placeholder: "Type a question" });
    const ask = make("button", { type: "submit", class: "r-button r-main", text: "Ask" });
    const form = make("form", { class: "r-say", on: { submit: (event) => {
      event.preventDefault();
      if (!area.value.trim()) return area.focus();
      act("say", { course: "", at, text: area.value, after: state.scene.turns.length });
    } } }, make("label", { for: "r-say", class: "r-hidden", text: "Your question" }), area, ask);
    // Enter sends where there is a keyboard; on a phone it is the only way to a new line.
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
      event.preventDefault();
      form.requestSubmit();
    });
    const asked = () => state.scene.turns.at(-1)?.question;
    if (kept.drafts.say && kept.drafts.say.trim() !== asked()) area.value = kept.drafts.say;
    area.addEventListener("input", () => {
      kept.drafts.say = area.value;
      keep();
    });
    const another = button("Begin another topic", () => act("go", { course: "", at: state.of }), { class: "r-link" });
    const before = button("The topic before", () => act("go", { course: "", at: at - 1 }), { class: "r-link", disabled: at === 0 });
    const nothing = make("p", { class: "r-hint", text:
      "Ask whatever you like. Your question goes to all versions at once, and each answers under a letter that it keeps as long as you stay with this topic." });
    patch = () => {
      const scene = state.scene;
      // A question is kept here until it is answered: a panel that ends meanwhile has forgotten it.
      if (kept.drafts.say && kept.drafts.say.trim() === asked()) {
        if (area.value === kept.drafts.say) area.value = "";
        if (scene.state === "there") delete kept.drafts.say;
      }
      show(nothing, scene.turns.length === 0);
      let fresh = false;
      scene.turns.forEach((turn, round) => {
        if (!turns[round]) {
          turns[round] = turnOf(round, true);
          said.append(turns[round].whole);
          fresh = round > 0 && drawnOnce;
        }
        turns[round].patch(turn);
      });
      if (fresh) turns.at(-1).whole.scrollIntoView({ block: "start" });
      drawnOnce = true;
      status.patch(scene);
      choice.patch(scene.turns.at(-1), scene.state === "there");
      ask.disabled = scene.state === "coming";
      show(another, scene.turns.length > 0);
    };
    return [
      top(),
      make("div", { class: "r-head" }, heading(at ? `Talk freely: topic ${at + 1}` : "Talk freely")),
      nothing, said, status.busy, status.whole, choice.whole,
      make("div", { class: "r-row" }, before, another),
      make("div", { class: "r-foot" }, form),
    ];
  }

  // ------------------------------------------------------------------------------------------------- the last word
  function verdict() {
    const given = state.given;
    const radio = (name, value, words, checked) => {
      const id = `r-${name}-${value}`;
      return make("label", { class: "r-option", for: id },
        make("input", { type: "radio", name, id, value, ...(checked ? { checked: true } : {}) }), make("span", { text: words }));
    };
    const note = make("textarea", { id: "r-note", rows: "4", maxlength: String(state.longest) });
    note.value = kept.drafts.last ?? (given ? given.note : "");
    note.addEventListener("input", () => {
      kept.drafts.last = note.value;
      keep();
    });
    const save = make("button", { type: "submit", class: "r-button r-main", text: "Save my recommendation" });
    const thanks = make("p", { class: "r-thanks", role: "status" });
    const form = make("form", { class: "r-form", on: { submit: (event) => {
      event.preventDefault();
      const good = form.querySelector("input[name=good]:checked");
      if (!good) {
        complain("Please choose yes or no first.");
        form.querySelector("input[name=good]").focus();
        return;
      }
      const mine = form.querySelector("input[name=favourite]:checked");
      delete kept.drafts.last;
      act("recommend", { good: good.value === "yes", favourite: mine?.value === "mine", note: note.value });
    } } },
      make("fieldset", {}, make("legend", { text: "Would you let this go out?" }),
        radio("good", "yes", "Yes, it is good enough", given?.good === true),
        radio("good", "no", "No, not yet", given?.good === false)),
      make("fieldset", {}, make("legend", { text: "Do you have a favourite?" }),
        radio("favourite", "mine", "Yes: the version that I chose most often", given ? given.favourite : false),
        radio("favourite", "none", "No preference", given ? !given.favourite : false),
        make("p", { class: "r-hint", text: "Which one that is stays hidden. If none was chosen more often than the others, none is noted." })),
      make("label", { for: "r-note", text: "Anything that you would like to add" }),
      note,
      save,
    );
    const approving = make("section", { class: "r-approve" });
    let approval = null;
    const approve = () => {
      if (state.approval === null || !state.given || state.approval === approval) return;
      approval = state.approval;
      const words = {
        "": "You may also approve this version yourself: then it can be sent on as it is.",
        checking: "Your approval is being written down: every file is read once more, which takes a few minutes. You can close this page.",
        approved: "You have approved this version. It can be taken back by whoever runs the training.",
        failed: "It could not be approved: something about it has changed. Whoever runs the training can see what.",
      }[approval];
      const id = "r-approve-note";
      const why = make("textarea", { id, rows: "2", maxlength: String(state.longest) });
      approving.replaceChildren(
        make("h2", { text: "Approve" }),
        make("p", { role: "status", text: words }),
        ...(approval === "" || approval === "failed"
          ? [make("label", { for: id, text: "A note with it, if you like" }), why, button("Approve this version", () => act("approve", { note: why.value }), { class: "r-button r-main" })]
          : approval === "checking" ? [button("Look again", () => act("look"))] : []),
      );
    };
    patch = () => {
      say(thanks, state.given ? `Thank you, ${state.name}. Your recommendation is saved: ${state.given.good ? "yes, it may go out" : "no, not yet"}. You can go on, or change it at any time.` : "");
      show(thanks, Boolean(state.given));
      if (state.given) say(save, "Save again");
      if (thanked) scrollTo(0, 0);
      thanked = false;
      show(approving, state.approval !== null && Boolean(state.given));
      approve();
    };
    return [
      make("nav", { class: "r-top", "aria-label": "Pages" }, button("‹ Overview", () => act("choose"), { class: "r-link" })),
      heading("Your recommendation"),
      make("p", { text: state.judged ? `You have said something about ${state.judged} ${state.judged === 1 ? "question" : "questions"} so far.` : "You have not said anything about an answer yet. You can still give your recommendation." }),
      thanks, form, approving,
    ];
  }

  // ---------------------------------------------------------------------------------------------------------- notices
  let off = null; // when the machine is to be switched off, in milliseconds
  function notice(value) {
    off = value && value.off !== null ? Date.now() + value.off * 1000 : null;
    const found = [];
    if (off !== null) {
      found.push(make("div", { class: "r-notice" },
        make("p", {}, "The work is done, and this machine switches itself off in ", make("b", { class: "r-left" }), ". Are you still reading?"),
        button("I am still reading", () => act("keep_machine"), { class: "r-button r-main" })));
    }
    if (value && value.waiting) {
      const seconds = value.waiting.seconds;
      found.push(make("div", { class: "r-notice" },
        make("p", { text: `A training waits for the machine${seconds ? `, and begins in about ${minutes(seconds)}` : ""}. While it runs, no answers can be given.` }),
        make("div", { class: "r-row" },
          button("I am still talking", () => act("keep_training_waiting"), { class: "r-button r-main" }),
          button("Go ahead", () => act("let_training_begin")))));
    }
    noticeBox.replaceChildren(...found);
    count();
  }
  function count() {
    if (off === null || !noticeBox) return;
    const left = Math.max(0, Math.round((off - Date.now()) / 1000));
    const node = noticeBox.querySelector(".r-left");
    if (node) say(node, left >= 120 ? `${Math.round(left / 60)} minutes` : `${left} seconds`);
  }
  setInterval(count, 1000);

  // ------------------------------------------------------------------------------------------------ what Gradio calls
  function reading(element, props, watch, trigger) {
    send = trigger;
    root = element.querySelector(".r-page");
    alertBox = make("p", { class: "r-alert", role: "alert", hidden: true });
    lostBox = make("p", { class: "r-lost", role: "status", hidden: true,
      text: "There is no connection just now. What you tap is kept here, and sent as soon as there is." });
    noticeBox = make("div", { class: "r-notices", "aria-live": "polite" });
    stage = make("div", { class: "r-stage" });
    root.replaceChildren(noticeBox, lostBox, alertBox, stage);
    watch("value", () => receive(props.value));
    // What was not saved when the page was closed goes first, as it was meant then.
    kept.outbox = kept.outbox.map((each) => ({ ...each, id: (number += 1) }));
    flying = null;
    const at = kept.at || {};
    kept.outbox.push({ id: (number += 1), do: "open", session: kept.session, screen: at.screen || "choose", ...(at.course !== undefined ? { course: at.course, at: at.at } : {}) });
    next();
  }

  function part(kind, props, watch) {
    watch("value", () => {
      const value = props.value;
      if (kind === "notices") notice(value);
      else if (value && state?.scene && value.course === state.course && value.at === state.at) {
        heard = Date.now();
        state.scene = value.scene;
        patch();
      }
    });
  }

  return { reading, part };
})();
window.dispatchEvent(new Event("katherineReview"));
