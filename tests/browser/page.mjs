// The real frontend in headless Chromium, and what both programs of this folder do with it.
// CHROMIUM names the program (browser_home.py finds it); playwright-core lies beside this file.
import { chromium } from 'playwright-core';

const ARGS = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-background-networking'];
const READY_NODE_TYPES = 100; // core registers several hundred; fewer means it is still loading

// A page on 127.0.0.1:port. vue: Vue nodes, else the legacy canvas. Requests that would leave this
// machine are refused. errors: messages of uncaught page errors, filled while the page lives.
export async function open(port, { vue, width = 1600, height = 1000, scale = 1 }) {
  const base = `http://127.0.0.1:${port}`;
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM, headless: true, args: ARGS,
  });
  const context = await browser.newContext({ viewport: { width, height }, deviceScaleFactor: scale });
  const page = await context.newPage();
  const errors = [];
  page.on('pageerror', (error) => errors.push(error.message));
  await page.route('**/*', (route) => {
    const url = new URL(route.request().url());
    const isLocal = url.hostname === '127.0.0.1' || ['data:', 'blob:'].includes(url.protocol);
    return isLocal ? route.continue() : route.abort();
  });
  // Without TutorialCompleted a dialog with templates covers the canvas.
  await page.request.post(`${base}/settings`, { data: {
    'Comfy.TutorialCompleted': true,
    'Comfy.VueNodes.Enabled': vue,
    'Comfy.Minimap.Visible': false,
    'Comfy.Workflow.ShowMissingModelsWarning': false,
  } });
  await page.goto(base);
  await page.waitForFunction((enough) => window.app?.graph &&
    Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > enough,
  READY_NODE_TYPES, { timeout: 120000 });
  return { browser, page, errors, base };
}

// An API prompt as comparable text: ids, classes and inputs in a fixed order, titles left out.
export function canonical(prompt) {
  const sorted = (object) => Object.keys(object).sort().map((key) => [key, object[key]]);
  return JSON.stringify(sorted(prompt).map(([id, node]) =>
    [id, node.class_type, sorted(node.inputs)]));
}

export async function loadGraph(page, workflow) {
  await page.evaluate((json) => window.app.loadGraphData(json, true, true, 'graph'), workflow);
}

export async function toPrompt(page) {
  return page.evaluate(async () => (await window.app.graphToPrompt()).output);
}

export async function run(page, id) {
  await page.evaluate((command) => window.app.extensionManager.command.execute(command), id);
}
