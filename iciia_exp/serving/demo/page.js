// Clients in the browser: a backbone, a step of the method, and the state of each client. No request leaves the page.
"use strict";

const demo = (() => {
  const facts = MODEL.facts;
  const [channels, height, width] = facts.picture;
  const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const address = (text, type) => URL.createObjectURL(new Blob([decode(text)], { type }));
  const status = document.getElementById("status");
  const say = (text, error = false) => {
    status.textContent = text;
    status.classList.toggle("error", error);
  };
  let backbone, step;
  let queue = Promise.resolve(); // images come one after the other

  // ---- the model

  async function load() {
    ort.env.wasm.numThreads = 1; // more need headers of a server
    ort.env.wasm.wasmBinary = decode(RUNTIME.wasm).buffer;
    ort.env.wasm.wasmPaths = { mjs: address(RUNTIME.mjs, "text/javascript") };
    const open = (text) => ort.InferenceSession.create(decode(text), { executionProviders: ["wasm"] });
    backbone = await open(MODEL.backbone);
    step = await open(MODEL.step);
  }

  const tensor = (values, shape) => new ort.Tensor("float32", values, shape);

  function probabilities(logits) {
    if (facts.task !== "single-label") return Array.from(logits, (x) => 1 / (1 + Math.exp(-x)));
    const top = Math.max(...logits);
    const exp = Array.from(logits, (x) => Math.exp(x - top));
    const sum = exp.reduce((a, b) => a + b, 0);
    return exp.map((x) => x / sum);
  }

  class Client {
    constructor() {
      this.reset();
    }

    reset() {
      this.past = []; // { keep, picture, influence } of the last images
      this.answer = null;
      this.seen = 0;
    }

    // Classify pixels, floats from 0 to 1, channels x height x width; the image joins the past.
    async add(pixels, picture = "") {
      const found = await backbone.run({ images: tensor(pixels, [1, channels, height, width]) });
      const features = found.features.data;
      const all = this.past.map(() => true);
      const [{ logits, keep }] = await this._step(features, [all]);
      const alone = probabilities(found.logits.data), adapted = probabilities(logits);
      const best = adapted.indexOf(Math.max(...adapted));
      // without each of the past images, all in one batch
      const others = await this._step(features, this.past.map((_, i) => all.map((_, j) => i !== j)));
      others.forEach((other, i) => {
        this.past[i].influence = Math.log(adapted[best]) - Math.log(probabilities(other.logits)[best]);
      });
      this.answer = { picture, alone, adapted, before: this.past.slice() };
      this.past = [...this.past, { keep, picture, influence: null }].slice(-facts.history);
      this.seen += 1;
      return this.answer;
    }

    async _step(features, masks) {
      if (!masks.length) return [];
      const D = facts.features, E = facts.state, P = Math.max(1, this.past.length), C = masks.length;
      const x = new Float32Array(C * D), past = new Float32Array(C * P * E), mask = new Uint8Array(C * P);
      masks.forEach((real, c) => {
        x.set(features, c * D);
        this.past.forEach(({ keep }, p) => past.set(keep, (c * P + p) * E));
        real.forEach((is, p) => { mask[c * P + p] = is ? 1 : 0; });
      });
      const found = await step.run({
        features: tensor(x, [C, D]),
        past: tensor(past, [C, P, E]),
        mask: new ort.Tensor("bool", mask, [C, P]),
      });
      const K = found.logits.dims[1];
      return masks.map((_, c) => ({
        logits: found.logits.data.slice(c * K, (c + 1) * K),
        keep: found.keep.data.slice(c * E, (c + 1) * E),
      }));
    }
  }

  const clients = [new Client(), new Client()];

  // ---- images

  // Return the pixels of a picture: its middle, as much of it as the network takes, scaled to the network's size.
  function pixelsOf(source, sourceWidth, sourceHeight) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    const { share, squash } = facts.window;
    const side = Math.min(sourceWidth, sourceHeight) / Math.min(width, height);
    const fits = Math.min(1, sourceWidth / (share * side * width), sourceHeight / (share * side * height));
    const w = share * (squash ? sourceWidth : fits * side * width);
    const h = share * (squash ? sourceHeight : fits * side * height);
    context.drawImage(source, (sourceWidth - w) / 2, (sourceHeight - h) / 2, w, h, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const pixels = new Float32Array(channels * height * width), size = height * width;
    for (let i = 0; i < size; i++) {
      const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
      if (channels === 1) pixels[i] = Math.floor((19595 * r + 38470 * g + 7471 * b + 0x8000) / 65536) / 255; // as Pillow
      else [r, g, b].forEach((value, c) => { pixels[c * size + i] = value / 255; });
    }
    return { pixels, picture: canvas.toDataURL() };
  }

  function addTo(number, make) {
    queue = queue.then(async () => {
      try {
        const { pixels, picture } = await make();
        await clients[number].add(pixels, picture);
        show(number);
        const { adapted } = clients[number].answer;
        say(`Client ${"AB"[number]}: ${facts.classes[adapted.indexOf(Math.max(...adapted))]}, after ${clients[number].seen - 1} other images.`);
      } catch (error) {
        say(String(error.message || error), true);
      }
    });
    return queue;
  }

  async function fromFile(file) {
    let image;
    try {
      image = await createImageBitmap(file);
    } catch {
      throw new Error(`${file.name} cannot be read as an image.`);
    }
    return pixelsOf(image, image.width, image.height);
  }

  // ---- the page

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  function answers(title, kind, p) {
    const order = p.map((_, k) => k).sort((a, b) => p[b] - p[a]).slice(0, 3);
    const rows = order.map((k) => {
      const bar = element("span");
      bar.style.width = `${100 * p[k]}%`;
      return element("tr", {},
        element("td", { className: "name", textContent: facts.classes[k], title: facts.classes[k] }),
        element("td", { className: "bar" }, bar),
        element("td", { className: "number", textContent: `${(100 * p[k]).toFixed(1)} %` }));
    });
    const head = element("tr", {}, element("th", { colSpan: 3, scope: "colgroup", textContent: title }));
    return element("tbody", { className: kind }, head, ...rows);
  }

  function show(number) {
    const panel = document.querySelector(`[data-client="${number}"]`), client = clients[number];
    panel.querySelectorAll(":scope > :not(h2)").forEach((old) => old.remove());
    const reset = element("button", { type: "button", textContent: "Reset", ariaLabel: `Reset client ${"AB"[number]}` });
    reset.onclick = () => {
      client.reset();
      show(number);
      panel.querySelector("button").focus();
      say(`Client ${"AB"[number]} is new again.`);
    };
    panel.append(reset);
    if (!client.answer) {
      panel.append(element("p", { className: "empty", textContent: "No images yet." }));
      return;
    }
    const { picture, alone, adapted, before } = client.answer;
    const title = before.length ? `With ${before.length} past image${before.length > 1 ? "s" : ""}` : "With no past images";
    panel.append(element("div", { className: "now" },
      element("img", { src: picture, alt: "the newest image" }),
      element("table", {}, answers("Backbone alone", "backbone", alone), answers(title, "adapted", adapted))));
    const most = before.reduce((a, b) => (!a || Math.abs(b.influence) > Math.abs(a.influence) ? b : a), null);
    panel.append(element("ul", { className: "past", ariaLabel: "past images and their influence" }, ...before.map((image) =>
      element("li", { className: (image === most ? "most " : "") + (image.influence < 0 ? "against" : "") },
        element("img", { src: image.picture, alt: "" }),
        element("span", { textContent: `${image.influence >= 0 ? "+" : "−"}${Math.abs(image.influence).toFixed(2)}` })))));
  }

  function listen() {
    const pad = document.getElementById("pad"), pen = pad.getContext("2d");
    const clear = () => {
      pen.fillStyle = "#000";
      pen.fillRect(0, 0, pad.width, pad.height);
    };
    clear();
    Object.assign(pen, { strokeStyle: "#fff", lineCap: "round", lineJoin: "round", lineWidth: 22 });
    const at = (event) => [event.offsetX * pad.width / pad.clientWidth, event.offsetY * pad.height / pad.clientHeight];
    pad.onpointerdown = (event) => {
      pad.setPointerCapture(event.pointerId);
      pen.beginPath();
      pen.moveTo(...at(event));
      pen.lineTo(...at(event));
      pen.stroke();
    };
    pad.onpointermove = (event) => {
      if (!event.buttons) return;
      pen.lineTo(...at(event));
      pen.stroke();
    };
    const chosen = () => Number(document.querySelector("[name=client]:checked").value);
    document.getElementById("clear").onclick = clear;
    document.getElementById("send").onclick = () => {
      const drawn = pixelsOf(pad, pad.width, pad.height); // now: its turn comes when the others are done
      clear();
      addTo(chosen(), async () => drawn);
    };
    const files = document.getElementById("files"), input = document.querySelector(".input");
    const take = (list) => { for (const file of list) addTo(chosen(), () => fromFile(file)); };
    files.onchange = () => {
      take(files.files);
      files.value = "";
    };
    input.ondragover = (event) => {
      event.preventDefault();
      input.classList.add("over");
    };
    input.ondragleave = () => input.classList.remove("over");
    input.ondrop = (event) => {
      event.preventDefault();
      input.classList.remove("over");
      take(event.dataTransfer.files);
    };
  }

  async function start() {
    document.getElementById("about").textContent =
      `${facts.method} behind ${facts.backbone}, ${facts.classes.length} classes; a client's last ${facts.history} images are kept.`;
    clients.forEach((_, number) => show(number));
    listen();
    try {
      await load();
      document.getElementById("send").disabled = document.getElementById("files").disabled = false;
      say("Ready.");
    } catch (error) {
      say(`The model cannot be loaded: ${error.message || error}`, true);
    }
  }

  const ready = start();
  return { ready, clients, facts, pixelsOf, show, idle: () => queue };
})();
