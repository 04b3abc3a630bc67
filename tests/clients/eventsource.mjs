// npm's `eventsource` on a live query: says on stdout what it gets, one JSON line each, until stdin ends.
//
//   node eventsource.mjs FOLDER_OF_NODE_MODULES URL

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { follow } from "./follow.mjs";

const [folder, url] = process.argv.slice(2);
const found = createRequire(`${folder}/any.js`).resolve("eventsource");
const { EventSource } = await import(pathToFileURL(found).href);

follow(EventSource, url, (said) => process.stdout.write(`${JSON.stringify(said)}\n`));
process.stdin.on("end", () => process.exit(0)).resume();
