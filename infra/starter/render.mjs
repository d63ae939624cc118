// Draws avatars: JSON lines of {style, options} on stdin, raw RGB (size x size x 3 bytes each) or,
// with "png", numbered PNG files out. usage: node render.mjs <size> <file.rgb | folder/> [png] < specs
import { createAvatar } from "@dicebear/core";
import * as collection from "@dicebear/collection";
import { Resvg } from "@resvg/resvg-js";
import fs from "node:fs";
import readline from "node:readline";

const [size, target, form] = process.argv.slice(2);
const width = Number(size);
const raw = form === "png" ? null : fs.openSync(target, "w");
let count = 0;
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { style, options } = JSON.parse(line);
  // Only the style's own options: an unknown one would be ignored in silence anyway.
  const known = collection[style].schema.properties;
  const core = ["seed", "backgroundColor", "scale", "translateX", "translateY", "rotate", "flip"];
  const kept = Object.fromEntries(Object.entries(options).filter(([key]) => key in known || core.includes(key)));
  const svg = createAvatar(collection[style], kept).toString();
  const picture = new Resvg(svg, { fitTo: { mode: "width", value: width }, font: { loadSystemFonts: false } }).render();
  count += 1;
  if (form === "png") {
    fs.writeFileSync(`${target}/${String(count).padStart(2, "0")}.png`, picture.asPng());
    continue;
  }
  const rgba = picture.pixels;
  const rgb = Buffer.alloc(width * width * 3);
  for (let pixel = 0; pixel < width * width; pixel += 1) rgba.copy(rgb, pixel * 3, pixel * 4, pixel * 4 + 3);
  fs.writeSync(raw, rgb);
}
