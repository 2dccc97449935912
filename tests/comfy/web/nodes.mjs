// SPDX-License-Identifier: Apache-2.0
// A web page that is only pretended: what our script does with the host's nodes. Prints JSON.
globalThis.document = { createElement: (tag) => ({ tag, style: {} }) };
globalThis.DOMParser = class {
  parseFromString(text) {
    return { documentElement: { textContent: text.replace(/<[^>]*>/g, "") } };
  }
};
await import("./extensions/distorch/distorch.js");

const extension = globalThis.extension;
extension.setup();

function kind(name, category, presets) {
  class Node {
    comfyClass = name;
    inputs = [];
    widgets = [];
    size = [320, 80];
    redraws = 0;
    constructor() {
      if (presets) this.widgets.push({ name: "spec", value: "auto", callback: (v) => (this.told = v) });
      this.onNodeCreated?.();
    }
    addDOMWidget(name, type, element, options) {
      const widget = { name, type, element, options };
      this.widgets.push(widget);
      return widget;
    }
    addWidget(type, name, value, callback, options) {
      const widget = { type, name, value, callback, options };
      this.widgets.push(widget);
      return widget;
    }
    computeSize() {
      return [300, 80 + (this.widgets.find((w) => w.element)?.options.getMinHeight() ?? 0)];
    }
    setSize(size) { this.size = size; }
    setDirtyCanvas() { this.redraws += 1; }
  }
  extension.beforeRegisterNodeDef(Node, {
    name, category, input: { required: presets ? { spec: ["STRING", { presets }] } : {} },
  });
  return Node;
}
const Placing = kind("DistributeModel", "distorch", { "Half": "cuda:0,50%;cpu,50%" });
const Loader = kind("UNETLoaderMultiGPU", "distorch/loaders");
const Other = kind("UNETLoader", "loaders");

const inner = { 3: new Loader() };
const group = { subgraph: { getNodeById: (id) => inner[id], _nodes: Object.values(inner) } };
const nodes = { 7: new Placing(), 8: new Other(), 9: new Placing(), 12: group };
globalThis.app.graph = { getNodeById: (id) => nodes[id], _nodes: Object.values(nodes) };
nodes[9].widgets[0].value = "cpu,*";
function send(number, kind, typed, svg) {
  globalThis.listeners["distorch.bar"]({ detail: { number, kind, typed, svg } });
}

send("7", "DistributeModel", { spec: "auto" }, "<svg>first</svg>");
send("7", "DistributeModel", { spec: "auto" }, "<svg>ü#%</svg>");
send("8", "DistributeModel", { spec: "gone" }, "<svg>of another workflow</svg>");
send("99", "NobodysNode", {}, "<svg>nobody</svg>");
send("12:3", "UNETLoaderMultiGPU", { unet_name: "a" }, "<svg>inside</svg>");
send("7", "DistributeModel", { spec: "cpu,*" }, "<svg>it is node 9 now</svg>");
const linked = nodes[9];
const moved = linked.distorchBar?.alt;
linked.inputs.push({ name: "spec", link: 4 });
send("9", "DistributeModel", { spec: "what came by the link" }, "<svg>linked</svg>");
const byLink = linked.distorchBar.alt;
const report = new Loader();
report.onExecuted({ distorch: [{ svg: "<svg>measured</svg>" }] });
report.onExecuted({}); // a run without a report

const placing = nodes[7];
const picture = placing.distorchBar;
const before = placing.widgets.at(-1).options.getMinHeight();
Object.assign(picture, { naturalWidth: 320, naturalHeight: 100 });
picture.onload();
picture.onload(); // the next one is as high
const [spec, list, bar] = placing.widgets;
list.callback("Half");
list.callback("nothing of that name");
console.log(JSON.stringify({
  address: picture.src, alt: picture.alt, before, after: bar.options.getMinHeight(),
  size: placing.size, redraws: placing.redraws, saved: [list.serialize, bar.serialize],
  sent: bar.options.serialize, names: placing.widgets.map((w) => w.name),
  choices: list.options.values, spec: spec.value, told: placing.told, shown: list.value,
  moved, byLink, other: nodes[8].widgets.length, inside: inner[3].distorchBar.alt,
  report: [report.distorchBar.alt, report.widgets.length],
}));
