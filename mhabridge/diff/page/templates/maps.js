"use strict";
// One head's three maps enlarged, with a cell that the mouse or the arrow keys move. Colours are read from the images.
(() => {
  const NOTHING = 255;
  const palettes = JSON.parse(document.getElementById("palettes").textContent)
    .map((text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0)));
  const codes = palettes.map((palette) => {
    const known = new Map();
    for (let i = 0; i < palette.length; i += 3) known.set((palette[i] << 16) | (palette[i + 1] << 8) | palette[i + 2], i / 3);
    return known;
  });

  function read(image, which) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const found = new Uint8Array(canvas.width * canvas.height);
    for (let i = 0; i < found.length; i++) {
      const colour = (pixels[4 * i] << 16) | (pixels[4 * i + 1] << 8) | pixels[4 * i + 2];
      found[i] = pixels[4 * i + 3] === 0 ? NOTHING : codes[which].get(colour) ?? NOTHING;
    }
    return found;
  }

  const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
  const short = (number) => (number === 0 ? "0" : Math.abs(number) >= 1e-3 && Math.abs(number) < 1e4
    ? String(Number(number.toPrecision(2))) : number.toExponential(1));

  class Board {
    constructor(section) {
      this.section = section;
      this.box = section.querySelector(".enlarged");
      this.heads = [...section.querySelectorAll(".head")];
      const { rows, columns, low, high, root, largest, first, second } = section.dataset;
      [this.rows, this.columns] = [rows, columns].map((text) => text.split(" ").map(Number));
      [this.low, this.high, this.largest, this.root] = [Number(low), Number(high), Number(largest), root === "1"];
      this.names = [first, second, "difference"];
      this.build();
      this.show(this.heads.find((head) => head.classList.contains("leads")) ?? this.heads[0]);
    }

    build() {
      this.title = make("h5");
      const boards = make("div", { className: "boards", tabIndex: 0 });
      boards.setAttribute("role", "application");
      this.canvases = this.names.map((name) => {
        const figure = make("figure"), canvas = make("canvas");
        canvas.setAttribute("aria-hidden", "true");
        figure.append(canvas, make("figcaption", { textContent: name }));
        boards.append(figure);
        canvas.addEventListener("pointermove", (event) => this.point(event, canvas));
        canvas.addEventListener("pointerdown", (event) => this.point(event, canvas));
        return canvas;
      });
      this.boards = boards;
      boards.addEventListener("keydown", (event) => this.press(event));
      this.readout = make("output", { className: "readout" });
      this.box.replaceChildren(this.title, boards, this.readout,
        make("p", { className: "small", textContent: "Rows are queries, columns are keys. The box marks the cell that differs most. Move the cell with the mouse or the arrow keys; Home goes back to that cell. Numbers read from colours are rounded." }));
      this.box.hidden = false;
      for (const head of this.heads) this.name(head);
    }

    name(head) {
      const button = make("button", { type: "button", textContent: head.dataset.title });
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => this.show(head));
      head.querySelector(".about b").replaceWith(button);
    }

    show(head) {
      const images = [...head.querySelectorAll("img")];
      this.worst = head.dataset.place.split(" ").map(Number);
      this.cell = [...this.worst];
      this.values = images.map((image, i) => read(image, i === 2 ? 1 : 0));
      [this.width, this.height] = [images[0].naturalWidth, images[0].naturalHeight];
      this.title.textContent = `${head.dataset.title}: ${head.querySelector(".about span").textContent}`;
      this.boards.setAttribute("aria-label", `Heat maps of ${head.dataset.title}. The arrow keys move the cell whose values are read out.`);
      for (const each of this.heads) each.querySelector("button").setAttribute("aria-pressed", String(each === head));
      this.scale = Math.max(4, Math.min(96, Math.floor(512 / Math.max(this.width, this.height))));
      this.draw();
    }

    draw() {
      this.canvases.forEach((canvas, which) => {
        [canvas.width, canvas.height] = [this.width * this.scale, this.height * this.scale];
        const context = canvas.getContext("2d"), palette = palettes[which === 2 ? 1 : 0];
        this.values[which].forEach((code, i) => {
          const x = (i % this.width) * this.scale, y = Math.floor(i / this.width) * this.scale;
          if (code === NOTHING) return this.cross(context, x, y);
          context.fillStyle = `rgb(${palette[3 * code]} ${palette[3 * code + 1]} ${palette[3 * code + 2]})`;
          context.fillRect(x, y, this.scale, this.scale);
          if (which === 2) this.sign(context, x, y, code);
        });
        this.frame(context, this.worst, 3);
        if (String(this.cell) !== String(this.worst)) this.frame(context, this.cell, 1);
      });
      this.tell();
    }

    cross(context, x, y) {
      context.fillStyle = "#ffffff";
      context.fillRect(x, y, this.scale, this.scale);
      context.strokeStyle = "#16191f";
      context.lineWidth = Math.max(1.5, this.scale / 6);
      context.beginPath();
      context.moveTo(x, y + this.scale);
      context.lineTo(x + this.scale, y);
      context.moveTo(x, y);
      context.lineTo(x + this.scale, y + this.scale);
      context.stroke();
    }

    // The sign of a large difference is also written, for who cannot tell the colours or prints in grey.
    sign(context, x, y, code) {
      if (this.scale < 14 || Math.abs(code - 127) < 32) return;
      context.fillStyle = Math.abs(code - 127) > 70 ? "#ffffff" : "#000000";
      context.font = `bold ${Math.min(24, this.scale)}px sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(code > 127 ? "+" : "\u2212", x + this.scale / 2, y + this.scale / 2);
    }

    frame(context, [row, column], width) {
      const outside = width + 1;
      for (const [colour, line, out] of [["#ffffff", width + 2, outside], ["#000000", width, outside]]) {
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.strokeRect(column * this.scale - out / 2, row * this.scale - out / 2, this.scale + out, this.scale + out);
      }
      context.lineWidth = 1;
    }

    attention(code) {
      if (code === NOTHING) return "NaN or infinite";
      const part = this.root ? (code / 254) ** 2 : code / 254;
      return `about ${short(this.low + part * (this.high - this.low))}`;
    }

    difference(code) {
      if (code === NOTHING) return "NaN or infinite";
      const number = ((code - 127) / 127) * this.largest;
      return number === 0 ? `less than ${short(this.largest / 254)}` : `about ${number > 0 ? "+" : ""}${short(number)}`;
    }

    span(starts, at) {
      return starts[at + 1] - starts[at] > 1 ? `${starts[at]} to ${starts[at + 1] - 1}` : `${starts[at]}`;
    }

    tell() {
      const [row, column] = this.cell, at = row * this.width + column;
      const blocks = this.rows[row + 1] - this.rows[row] > 1 || this.columns[column + 1] - this.columns[column] > 1;
      this.readout.textContent = `query ${this.span(this.rows, row)}, key ${this.span(this.columns, column)}`
        + `${blocks ? " (where this block differs most)" : ""}: ${this.names[0]} ${this.attention(this.values[0][at])}, `
        + `${this.names[1]} ${this.attention(this.values[1][at])}, difference ${this.largest ? this.difference(this.values[2][at]) : this.values[2][at] === NOTHING ? "NaN or infinite" : "0"}`
        + `${String(this.cell) === String(this.worst) ? " (the cell that differs most)" : ""}`;
    }

    move(row, column) {
      this.cell = [Math.min(this.height - 1, Math.max(0, row)), Math.min(this.width - 1, Math.max(0, column))];
      this.draw();
    }

    point(event, canvas) {
      const box = canvas.getBoundingClientRect();
      this.move(Math.floor(((event.clientY - box.top) / box.height) * this.height),
        Math.floor(((event.clientX - box.left) / box.width) * this.width));
    }

    press(event) {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key === "Home") this.move(...this.worst);
      else if (steps[event.key]) this.move(this.cell[0] + steps[event.key][0], this.cell[1] + steps[event.key][1]);
      else return;
      event.preventDefault();
    }
  }

  const ready = (section) => [...section.querySelectorAll("img")].every((image) => image.complete && image.naturalWidth);
  function draw(picture) {
    const section = picture.querySelector(".maps");
    if (!section || section.dataset.drawn || !ready(section)) return false;
    section.dataset.drawn = "yes";
    new Board(section);
    return true;
  }
  // Only what is opened is drawn. Its images may still be on their way: they are part of the page, so soon.
  async function opened(picture) {
    const section = picture.querySelector(".maps");
    if (!picture.open || !section || section.dataset.drawn) return;
    if (draw(picture)) return;
    await Promise.all([...section.querySelectorAll("img")].map((image) => image.decode().catch(() => {})));
    draw(picture);
  }
  for (const picture of document.querySelectorAll("details.picture")) {
    picture.addEventListener("toggle", () => opened(picture));
    if (picture.open) opened(picture);
  }
})();
