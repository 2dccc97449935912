// SPDX-License-Identifier: Apache-2.0
// Shows what a Distribution Report measured on the node itself: the picture that it sent.
import { app } from "../../scripts/app.js";

const EDGE = 4;

// The picture as an image that a canvas can draw. It is there a moment later, and so is its height.
function loaded(svg, node) {
  const image = new Image();
  image.onload = () => {
    node.setSize([node.size[0], node.computeSize()[1]]);
    node.setDirtyCanvas(true);
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  return image;
}

function heightFor(image, width) {
  return image?.naturalWidth ? ((width - 2 * EDGE) * image.naturalHeight) / image.naturalWidth : 56;
}

app.registerExtension({
  name: "distorch.report",
  beforeRegisterNodeDef(type, data) {
    if (data.name !== "DistributionReport") return;
    const executed = type.prototype.onExecuted;
    type.prototype.onExecuted = function (message) {
      executed?.apply(this, arguments);
      const found = message?.distorch?.[0];
      this.distorch = found && loaded(found.svg, this);
      if (found && !this.widgets?.some((widget) => widget.name === "distorch")) {
        this.addCustomWidget({
          name: "distorch",
          type: "distorch",
          serialize: false,
          computeSize: (width) => [width, heightFor(this.distorch, width)],
          draw: (context, node, width, y) =>
            node.distorch?.complete &&
            context.drawImage(node.distorch, EDGE, y, width - 2 * EDGE, heightFor(node.distorch, width)),
        });
      }
      this.setDirtyCanvas(true);
    };
  },
});
