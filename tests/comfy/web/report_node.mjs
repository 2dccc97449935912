// SPDX-License-Identifier: Apache-2.0
// A node of a host that is only pretended: what the script of the Distribution Report does with it.
// Prints JSON.
globalThis.Image = class {
  set src(address) {
    this.address = address;
    setTimeout(() => {
      Object.assign(this, { complete: true, naturalWidth: 480, naturalHeight: 120 });
      this.onload();
    });
  }
};
await import("./extensions/distorch/distorch.js");

class Node {
  redraws = 0;
  widgets = [];
  addCustomWidget(widget) { this.widgets.push(widget); }
  size = [250, 80];
  setSize(size) { this.size = size; }
  computeSize() { return [300, 100]; }
  setDirtyCanvas() { this.redraws += 1; }
}
const { beforeRegisterNodeDef } = globalThis.extension;
beforeRegisterNodeDef(class Other {}, { name: "Other" });
beforeRegisterNodeDef(Node, { name: "DistributionReport" });

const node = new Node();
const drawn = [];
const context = { drawImage: (image, ...place) => drawn.push(place) };
const draw = () => node.widgets.forEach((widget) => widget.draw(context, node, 308, 40));
node.onExecuted({ distorch: [{ svg: "<svg>first</svg>" }] });
draw(); // the image is not there yet
node.onExecuted({ distorch: [{ svg: "<svg>ü#%</svg>" }] });
const early = drawn.length;
await new Promise((done) => setTimeout(done, 5));
draw();
const [address, redraws] = [node.distorch.address, node.redraws];
const size = node.widgets[0].computeSize(308);
node.onExecuted({}); // a run without a report
draw();
const widgets = node.widgets.length;
console.log(JSON.stringify({ early, drawn, size, address, redraws, widgets, grown: node.size }));
