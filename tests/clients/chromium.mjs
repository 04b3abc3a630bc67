// Chromium's own EventSource on a live query, driven by Playwright: says on stdout what it gets, one JSON line each, until
// stdin ends.
//
//   node chromium.mjs FOLDER_OF_NODE_MODULES URL PATH_OF_CHROMIUM

import { createRequire } from "node:module";
import { follow } from "./follow.mjs";

const [folder, url, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(`${folder}/any.js`)("playwright-core");

// The sandbox needs rights that a container does not give; the only page it opens is our own server's.
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
page.on("console", (message) => {
    // Chromium's own complaints about broken connections are no report of ours.
    if (message.type() === "log") process.stdout.write(`${message.text()}\n`);
});
// Any page of the server's own origin: to others it shows nothing.
await page.goto(new URL("/healthz", url).href);
await page.evaluate(`(${follow})(EventSource, ${JSON.stringify(url)}, (said) => console.log(JSON.stringify(said)))`);
process.stdin.on("end", () => browser.close().then(() => process.exit(0))).resume();
