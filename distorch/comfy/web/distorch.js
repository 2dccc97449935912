// SPDX-License-Identifier: Apache-2.0
// Shows what a Distribution Report measured on the node itself: a bar of what is where, and rates.
import { app } from "../../scripts/app.js";

const COLOURS = ["#4085f4", "#f0a03c", "#78be5a", "#be5abe", "#e65a5a"];
const HEIGHT = 56;

const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;

function draw(context, found, width, y) {
  const total = Object.values(found.bytes).reduce((sum, bytes) => sum + bytes, 0) || 1;
  let x = 12;
  let label = 12;
  Object.entries(found.bytes).forEach(([device, bytes], index) => {
    const colour = COLOURS[index % COLOURS.length];
    const share = ((width - 24) * bytes) / total;
    context.fillStyle = colour;
    context.fillRect(x, y, share, 16);
    x += share;
    context.font = "11px sans-serif";
    const text = `${device} ${mib(bytes)}`;
    context.fillText(text, label, y + 30);
    label += context.measureText(text).width + 12;
  });
  const rates = Object.entries(found.gb_per_second).map(([link, rate]) => `${link} ${rate.toFixed(2)} GB/s`);
  const stall = `stalls ${found.stall_seconds.toFixed(2)} s`;
  context.fillStyle = found.ok ? "#999" : "#e65a5a";
  context.fillText(found.ok ? [...rates, stall].join("   ") : found.problems[0], 12, y + 46);
}

app.registerExtension({
  name: "distorch.report",
  beforeRegisterNodeDef(type, data) {
    if (data.name !== "DistributionReport") return;
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (message) {
      executed?.apply(this, arguments);
      this.distorch = message?.distorch?.[0];
      if (this.distorch && !this.widgets?.some((widget) => widget.name === "distorch")) {
        this.addCustomWidget({
          name: "distorch",
          type: "distorch",
          serialize: false,
          computeSize: (width) => [width, HEIGHT],
          draw: (context, node, width, y) => node.distorch && draw(context, node.distorch, width, y),
        });
        this.setSize(this.computeSize());
      }
      this.setDirtyCanvas(true);
    };
  },
});
