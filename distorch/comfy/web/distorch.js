// SPDX-License-Identifier: Apache-2.0
// Two things on nodes of distorch:
// - A bar: where a model's weights are, and what travels while it samples. The server makes the
//   picture and sends it to the node that placed the model. A Distribution Report shows its own.
// - A list of presets: specs that the server has made for this machine. They are with the input.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "distorch.bar";
const EDGE = 4; // pixels around the bar
const CHOOSE = "choose a spec for this machine";

// A node by the number that the server has for it: "12", or "12:3" for node 3 of subgraph 12.
function nodeAt(number) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(number).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

function* allNodes(graph) {
  for (const node of graph._nodes) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

// Whether a node is of this kind, and has what was typed into the one that the server means.
function isSuch(node, kind, typed) {
  if (node?.comfyClass !== kind) return false;
  return (node.widgets ?? []).every((widget) => {
    const linked = node.inputs?.some((input) => input.name === widget.name && input.link != null);
    return linked || !(widget.name in typed) || String(widget.value) === String(typed[widget.name]);
  });
}

// The host keeps models for later prompts: by then the node may have another number, or another
// workflow may be open. Then it is the only node of that kind with the same inputs, or none.
function nodeFor({ number, kind, typed }) {
  const first = nodeAt(number);
  if (isSuch(first, kind, typed)) return first;
  const such = [...allNodes(app.rootGraph ?? app.graph)].filter((node) => isSuch(node, kind, typed));
  return such.length === 1 ? such[0] : undefined;
}

// The bar's height follows the node's width, in the picture's proportion.
function heightOf(picture, node) {
  if (!picture.naturalWidth) return 60;
  return ((node.size[0] - 2 * EDGE) * picture.naturalHeight) / picture.naturalWidth + 2 * EDGE;
}

function barOn(node) {
  const picture = document.createElement("img");
  picture.className = "distorch-bar";
  picture.style.width = "100%";
  picture.style.objectFit = "contain";
  const height = () => heightOf(picture, node);
  const widget = node.addDOMWidget("distorch_bar", "distorch", picture, {
    serialize: false, // not a part of the prompt
    hideOnZoom: false,
    margin: EDGE,
    getMinHeight: height,
    getMaxHeight: height,
  });
  widget.serialize = false; // nor of the saved workflow
  let shown = 0;
  picture.onload = () => {
    if (picture.naturalHeight === shown) return;
    shown = picture.naturalHeight;
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    node.setDirtyCanvas(true, true);
  };
  return picture;
}

function show(node, svg) {
  node.distorchBar ??= barOn(node);
  node.distorchBar.alt = new DOMParser().parseFromString(svg, "image/svg+xml").documentElement.textContent;
  node.distorchBar.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
}

// Choosing one writes it into the input `spec`. What the list shows is not saved: on another machine
// it has other entries. It comes last, because saved values find their widgets by the order.
function addPresets(node, presets) {
  const spec = node.widgets?.find((widget) => widget.name === "spec");
  if (!spec || !presets) return;
  const values = [CHOOSE, ...Object.keys(presets)];
  const list = node.addWidget("combo", "preset", CHOOSE, choose, { values, serialize: false });
  list.serialize = false;
  function choose(title) {
    if (!(title in presets)) return;
    spec.value = presets[title];
    spec.callback?.(spec.value);
    list.value = CHOOSE;
    node.setDirtyCanvas(true, true);
  }
}

app.registerExtension({
  name: "distorch",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      const node = nodeFor(detail);
      if (node) show(node, detail.svg);
    });
  },
  beforeRegisterNodeDef(type, data) {
    if (!data.category?.startsWith("distorch")) return;
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (message) {
      executed?.apply(this, arguments);
      const found = message?.distorch?.[0];
      if (found) show(this, found.svg);
    };
    const created = type.prototype.onNodeCreated;
    type.prototype.onNodeCreated = function () {
      created?.apply(this, arguments);
      addPresets(this, data.input?.required?.spec?.[1]?.presets);
    };
  },
});
