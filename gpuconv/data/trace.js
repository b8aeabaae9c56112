"use strict";
{
  // Every number was computed and written by Python; the script only shows them.
  const data = JSON.parse(document.getElementById("data").textContent);
  const { steps, channels, padded, taps, output, stride, dilation, before } = data;
  const [OH, OW] = output;
  const [KH, KW] = taps;
  const last = steps.length - 1;
  // Height of a cell where there is room, in CSS pixels: what keeps the figure on one screen, within reason.
  const BASE = Math.max(24, Math.min(46, Math.floor(620 / (channels * padded[0]))));
  const LETTERS = Math.min(16, BASE * 0.42); // size of the numbers where there is room
  const SMALLEST = 7; // below this size of letters there are none, and the shading must do
  const PACE = 1000; // milliseconds per step at speed 1
  const WORDY = 400; // a longer sum is neither listened to nor read

  const get = (id) => document.getElementById(id);
  const make = (tag, className = "", text = "") => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.textContent = text;
    return element;
  };
  const bracketed = (text) => (text.startsWith("−") || text.endsWith("j") ? `(${text})` : text);
  const range = (n) => Array.from({ length: n }, (_, i) => i);

  // A table of rows × columns; `fill` finishes each td, which it is given with its place.
  function sheet(rows, columns, className, fill) {
    const table = make("table", className);
    for (const _ of range(rows)) {
      const row = table.insertRow();
      for (const _ of range(columns)) row.insertCell();
    }
    const cells = [...table.querySelectorAll("td")];
    cells.forEach(fill);
    return { table, cells };
  }

  // A grid of numbers under its title.
  function board(kind, [rows, columns], title, label, fill) {
    const { table, cells } = sheet(rows, columns, "", fill);
    table.setAttribute("aria-label", label);
    const figure = make("figure", "grid");
    const caption = make("figcaption");
    caption.append(...title);
    const wrapper = make("div", `board ${kind}`);
    wrapper.style.setProperty("--cols", columns);
    wrapper.append(table);
    figure.append(caption, wrapper);
    return { figure, wrapper, table, cells, columns };
  }

  function shade(td, tint) {
    td.classList.toggle("plus", tint > 0);
    td.classList.toggle("minus", tint < 0);
    td.style.setProperty("--t", Math.abs(tint));
  }

  const of = (c) => (channels > 1 ? `, channel ${c}` : "");
  const named = (name, letter, size, c, extra = "") => {
    const title = make("span", "name", channels > 1 && c !== undefined ? "" : `${name} `);
    title.append(make("i", "", letter), c === undefined ? "" : of(c));
    return [title, make("span", "size", size.join("×") + extra)];
  };
  const where = data.padding.some(Boolean) ? `, with padding ${padded.join(" by ")}` : "";

  const inputs = range(channels).map((c) => board(
    "input", padded, named("Input", "x", data.size, c, where && " + padding"),
    `Input${of(c)}, ${data.size.join(" by ")}${where}`,
    (td, at) => {
      td.textContent = data.input[c][at];
      shade(td, data.inputTint[c][at]);
      td.classList.toggle("pad", data.padding[at] === 1);
    },
  ));
  for (const input of inputs) {
    input.frame = make("div", "frame");
    input.wrapper.append(input.frame);
  }
  const kernels = range(channels).map((c) => board(
    "kernel", taps, named("Kernel", "k", taps, c), `Kernel${of(c)}, ${taps.join(" by ")}`,
    (td, at) => {
      td.textContent = data.kernel[c][at];
      td.dataset.tap = `${c}-${at}`;
      shade(td, data.kernelTint[c][at]);
    },
  ));
  const result = board("result", output, named("Output", "y", output), `Output, ${output.join(" by ")}`, (td, at) => {
    td.dataset.at = at;
    td.setAttribute("role", "gridcell");
    td.tabIndex = -1;
  });
  result.table.setAttribute("role", "grid");
  for (const row of result.table.rows) row.setAttribute("role", "row");

  const partials = [];
  const term = (sign, figure) => {
    const pair = make("div", "term");
    pair.append(make("span", "op", sign), figure);
    return pair;
  };
  const stack = make("div", channels > 1 ? "channels" : "channels single");
  for (const c of range(channels)) {
    const row = make("div", "channel");
    row.append(inputs[c].figure, term("∗", kernels[c].figure));
    if (channels > 1) {
      const partial = make("figure", "grid partial");
      partial.append(make("figcaption", "", "partial sum"), make("b"));
      partials.push(partial.lastChild);
      row.append(term("=", partial));
    }
    stack.append(row);
  }
  get("figure").append(stack, term(channels > 1 ? "Σ" : "=", result.figure));

  // Patch × kernel = product, per channel, and the ledger of the sum.
  const matrix = (fill) => {
    const { table, cells } = sheet(KH, KW, "matrix", fill);
    const figure = make("figure");
    figure.append(table);
    return { figure, cells };
  };
  const works = range(channels).map((c) => {
    const tag = (td, at) => { td.dataset.tap = `${c}-${at}`; };
    const patch = matrix(tag);
    const kernel = matrix((td, at) => { tag(td, at); td.textContent = data.kernel[c][at]; });
    const product = matrix(tag);
    const line = make("div", "matrices");
    if (channels > 1) line.append(make("span", "which", `Channel ${c}`));
    line.append(patch.figure, term("×", kernel.figure), term("=", product.figure));
    get("products").append(line);
    const list = make("ol");
    list.style.gridTemplateColumns = `repeat(${KW}, auto)`;
    list.setAttribute("aria-label", `Products and the sum so far${channels > 1 ? `, channel ${c}` : ""}`);
    const terms = range(KH * KW).map((at) => {
      const item = make("li");
      item.append(make("span"), make("span", "total"));
      tag(item, at);
      list.append(item);
      return item;
    });
    get("ledger").append(list);
    return { patch: patch.cells, product: product.cells, terms };
  });
  works[channels - 1].terms.at(-1).classList.add("end");

  // What an output reads, as places in the padded input.
  const field = (at) => {
    const top = Math.floor(at / OW) * stride[0];
    const left = (at % OW) * stride[1];
    return range(KH * KW).map(
      (tap) => (top + Math.floor(tap / KW) * dilation[0]) * padded[1] + left + (tap % KW) * dilation[1],
    );
  };

  let now = 0;
  let timer = 0;
  let marked = [];
  let peeked = [];

  function show(at, announce = true) {
    const grasp = result.table.contains(document.activeElement);
    result.cells[now].tabIndex = -1;
    now = Math.max(0, Math.min(last, at));
    const step = steps[now];
    const i = Math.floor(now / OW);
    const j = now % OW;

    for (const td of marked) {
      td.classList.remove("tap", "linked");
      delete td.dataset.weight;
      delete td.dataset.tap;
    }
    marked = [];
    const places = field(now);
    inputs.forEach((input, c) => {
      input.frame.style.transform =
        `translate(calc(${j * stride[1]} * var(--w)), calc(${i * stride[0]} * var(--h)))`;
      places.forEach((place, tap) => {
        const td = input.cells[place];
        td.classList.add("tap");
        td.dataset.weight = `×${data.kernel[c][tap]}`;
        td.dataset.tap = `${c}-${tap}`;
        marked.push(td);
        works[c].patch[tap].textContent = data.input[c][place];
        const product = step.products[c][tap];
        works[c].product[tap].textContent = product;
        works[c].product[tap].classList.toggle("nil", product === "0");
        const [term, total] = works[c].terms[tap].children;
        term.textContent = (c + tap > 0 ? "+ " : "") + (c + tap > 0 ? bracketed(product) : product);
        total.textContent = step.running[c][tap];
      });
      if (channels > 1) partials[c].textContent = step.channels[c];
    });
    result.cells.forEach((td, k) => {
      const later = k > now;
      td.classList.toggle("later", later);
      td.classList.toggle("now", k === now);
      td.textContent = later ? "" : steps[k].sum;
      shade(td, later ? 0 : data.outputTint[k]);
      td.setAttribute("aria-label",
        `Row ${Math.floor(k / OW)}, column ${k % OW}: ${later ? "not reached" : steps[k].sum}`);
      td.setAttribute("aria-selected", k === now);
    });
    result.cells[now].tabIndex = 0;
    if (grasp) result.cells[now].focus({ preventScroll: true });

    get("position").textContent = `Position (${i}, ${j})`;
    formula(i, j, step);
    const sum = step.calculation.length > WORDY ? step.sum : `${step.calculation} = ${step.sum}`;
    const scrub = get("scrub");
    scrub.value = now;
    scrub.setAttribute("aria-valuetext", `Step ${now + 1} of ${steps.length}, row ${i}, column ${j}`);
    get("count").textContent = `${now + 1} / ${steps.length}`;
    // Not `disabled`, which would take the focus away from who has stepped here with the button.
    for (const id of ["first", "back"]) get(id).setAttribute("aria-disabled", now === 0);
    for (const id of ["last", "forward"]) get(id).setAttribute("aria-disabled", now === last);
    // Not while it plays: nobody can listen that fast.
    if (announce) get("live").textContent = `Row ${i}, column ${j}: ${sum}`;
  }

  // y[0,1] = Σ x[0 + p, 1 + q]·k[p,q] = … with the numbers of this step.
  function formula(i, j, step) {
    const index = (at, axis, letter) => {
      const offset = at * stride[axis] - before[axis];
      const walk = (dilation[axis] === 1 ? "" : String(dilation[axis])) + letter;
      return offset === 0 ? walk : `${String(offset).replace("-", "−")} + ${walk}`;
    };
    const c = channels > 1 ? "c, " : "";
    const slanted = (text) => text.split(/([a-z])/).map((part, at) => (at % 2 ? make("i", "", part) : part));
    const sub = make("sub");
    sub.append(...slanted(channels > 1 ? "cpq" : "pq"));
    get("sum").replaceChildren(
      ...slanted(`y[${i}, ${j}] = Σ`), sub,
      ...slanted(` x[${c}${index(i, 0, "p")}, ${index(j, 1, "q")}] · k[${c}p, q] = `),
      ...(step.calculation.length > WORDY ? [] : [`${step.calculation} = `]), make("b", "", step.sum),
    );
  }

  function mark(cells, said) {
    for (const td of peeked) td.classList.remove("peek");
    peeked = cells;
    for (const td of peeked) td.classList.add("peek");
    get("hint").textContent = said;
  }
  const many = (n, noun) => (n === 1 ? noun : `${noun}s`);
  const rest = () => mark([], "Point at an output to see what it reads, at a pixel to see what reads it.");

  function peek(at) {
    const places = field(at);
    const spread = (first, n, d) => (d === 1 && n > 1
      ? `${first}–${first + n - 1}` : range(n).map((k) => first + k * d).join(", ")).replace(/-/g, "−");
    const [i, j] = [Math.floor(at / OW), at % OW];
    const rows = `${many(KH, "row")} ${spread(i * stride[0] - before[0], KH, dilation[0])}`;
    const columns = `${many(KW, "column")} ${spread(j * stride[1] - before[1], KW, dilation[1])}`;
    mark(inputs.flatMap((input) => places.map((place) => input.cells[place])),
      `Output (${i}, ${j})${at <= now ? ` = ${steps[at].sum}` : ""} reads ${rows}, ${columns}.`);
  }

  function readers(c, place) {
    const outputs = range(steps.length).filter((at) => field(at).includes(place));
    const row = Math.floor(place / padded[1]) - before[0];
    const name = `(${row}, ${(place % padded[1]) - before[1]})`.replace(/-/g, "−");
    const count = outputs.length === 0 ? "no output" : `${outputs.length} ${many(outputs.length, "output")}`;
    mark(outputs.map((at) => result.cells[at]), `Pixel ${name} = ${data.input[c][place]} is read by ${count}.`);
  }

  // Playing

  const playing = () => timer !== 0;
  function tick() {
    timer = window.setTimeout(() => {
      if (now < last) show(now + 1, false);
      if (now < last) tick();
      else pause();
    }, PACE / Number(get("speed").value));
  }
  function play() {
    if (now === last) show(0, false);
    document.body.classList.add("playing");
    get("play").setAttribute("aria-label", "Pause");
    tick();
  }
  function pause() {
    window.clearTimeout(timer);
    timer = 0;
    document.body.classList.remove("playing");
    get("play").setAttribute("aria-label", "Play");
    show(now);
  }
  function go(at) {
    if (playing()) pause();
    show(at);
  }

  // What fits. All sizes in CSS pixels.

  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `600 100px ${getComputedStyle(document.body).fontFamily}`;
  const widest = (texts) => Math.max(0.6, ...texts.map((text) => pen.measureText(text).width / 100)); // in em
  const kinds = [
    { boards: inputs, em: widest(data.input.flat()) },
    { boards: kernels, em: widest(data.kernel.flat()) },
    { boards: [result], em: widest(steps.map((step) => step.sum)) },
  ];
  for (const kind of kinds) kind.wish = Math.min(100, Math.max(BASE, kind.em * LETTERS + 10)); // width of a cell

  // The part of its wished size that each kind of grid gets.
  function scales(room) {
    const [x, k, y] = kinds.map(({ boards, wish }) => boards[0].columns * wish + 2);
    const signs = channels > 1 ? 240 : 110; // operators, gaps and the partial sum between the grids
    const abreast = (room - signs) / (x + k + y);
    if (abreast >= 0.7) return [abreast, abreast, abreast];
    // Where numbers could not be read even in a row of their own, shades side by side say more.
    const shades = (room - signs - 0.6 * k) / (x + y);
    if (room / x < 0.6 && shades * BASE >= 8) return [shades, 0.6, shades];
    const pair = (room - 64) / (channels > 1 ? Math.max(k + 90, y) : k + y);
    return [room / x, ...(pair < 0.6 ? [(room - 32) / k, (room - 32) / y] : [pair, pair])];
  }

  function fit() {
    const parts = scales(get("figure").clientWidth);
    kinds.forEach(({ boards, em, wish }, kind) => {
      const width = Math.max(3, Math.floor(wish * Math.min(1, parts[kind])));
      const height = Math.min(BASE, width);
      const letters = Math.max(1, Math.min(LETTERS, height * 0.42, (width - 6) / em));
      for (const { wrapper, frame } of boards) {
        wrapper.style.setProperty("--w", `${width}px`);
        wrapper.style.setProperty("--h", `${height}px`);
        wrapper.style.setProperty("--font", `${letters}px`);
        wrapper.classList.toggle("dense", letters < SMALLEST);
        wrapper.classList.toggle("roomy", height >= 34 && letters * 0.66 * (kinds[1].em + 0.9) < width - 4);
        if (frame) {
          frame.style.width = `${((KW - 1) * dilation[1] + 1) * width + 1}px`;
          frame.style.height = `${((KH - 1) * dilation[0] + 1) * height + 1}px`;
        }
      }
    });
  }

  // Pointer and keys

  const outputAt = (event) => {
    const td = event.target.closest?.("td[data-at]");
    return td ? Number(td.dataset.at) : null;
  };
  const peekAt = (event) => (outputAt(event) === null ? rest() : peek(outputAt(event)));
  result.table.addEventListener("pointerover", peekAt);
  result.table.addEventListener("pointerleave", rest);
  result.table.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && peekAt(event));
  result.table.addEventListener("focusout", rest);
  inputs.forEach(({ table, cells }, c) => {
    table.addEventListener("pointerover", (event) => {
      const place = cells.indexOf(event.target);
      if (place >= 0) readers(c, place);
    });
    table.addEventListener("pointerleave", rest);
  });
  result.table.addEventListener("click", (event) => {
    if (outputAt(event) !== null) go(outputAt(event));
  });
  // A product, its two factors and its place in the sum are shown as one.
  const link = (event, on) => {
    const tap = event.target.closest?.("[data-tap]")?.dataset.tap;
    for (const element of document.querySelectorAll(".linked")) element.classList.remove("linked");
    if (!on || !tap) return;
    for (const element of document.querySelectorAll(`[data-tap="${tap}"]`)) element.classList.add("linked");
  };
  document.addEventListener("pointerover", (event) => link(event, true));
  document.addEventListener("pointerout", (event) => link(event, false));

  get("scrub").max = last;
  get("scrub").addEventListener("input", (event) => go(Number(event.target.value)));
  get("first").addEventListener("click", () => go(0));
  get("back").addEventListener("click", () => go(now - 1));
  get("forward").addEventListener("click", () => go(now + 1));
  get("last").addEventListener("click", () => go(last));
  get("play").addEventListener("click", () => (playing() ? pause() : play()));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
    const moves = {
      ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last,
      ArrowDown: now + OW <= last ? now + OW : now, ArrowUp: now - OW >= 0 ? now - OW : now,
    };
    if (event.key in moves) go(moves[event.key]);
    else if (event.key === " " && !event.target.matches("button")) (playing() ? pause : play)();
    else return;
    event.preventDefault();
  });

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const press = () => get("theme").setAttribute("aria-pressed", isDark());
  get("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    press();
  });
  dark.addEventListener("change", press);

  press();
  new ResizeObserver(fit).observe(get("figure"));
  fit();
  rest();
  show(0, false);
}
