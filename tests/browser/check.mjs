// What a user sees, on the real page: node check.mjs PORT VUE TEMPLATES.json TINY.json PICTURE.png
// TEMPLATES: [{name, workflow, prompt}], GUI files and their API twins; TINY: {prompt, node, text,
// type, help}: a prompt to queue, its report node, and words that must show. Prints one JSON line
// per check: {"check": .., "ok": .., "detail": ..}.
import fs from 'fs';
import { canonical, loadGraph, open, run, toPrompt } from './page.mjs';

const [port, vue, templatesFile, tinyFile, pictureFile] = process.argv.slice(2);
const templates = JSON.parse(fs.readFileSync(templatesFile, 'utf8'));
const tiny = JSON.parse(fs.readFileSync(tinyFile, 'utf8'));
const say = (check, ok, detail = '') => console.log(JSON.stringify({ check, ok, detail }));

const { browser, page, errors, base } = await open(port, { vue: vue === 'true' });

async function graphs() {
  for (const { name, workflow, prompt } of templates) {
    await loadGraph(page, workflow);
    const missing = await page.evaluate(() => window.app.graph._nodes
      .filter((node) => !window.LiteGraph.registered_node_types[node.type])
      .map((node) => node.type));
    say(`${name}: no missing node`, missing.length === 0, missing.join());
    const back = canonical(await toPrompt(page));
    say(`${name}: converts to its twin`, back === canonical(prompt), back);
    const again = await page.evaluate(async () => (await window.app.graphToPrompt()).workflow);
    const places = (graph) => JSON.stringify(graph.nodes.map((n) => [n.id, n.type, n.pos]).sort());
    say(`${name}: keeps its places`, places(again) === places(workflow), places(again));
  }
}

// The sampler's own number may come from the cache, so the run is awaited, not timed.
async function queue() {
  await page.evaluate((prompt) => window.app.loadApiJson(prompt, 'tiny'), tiny.prompt);
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  let last;
  for (let i = 0; i < 120 && last?.status?.completed !== true; i++) {
    await page.waitForTimeout(500);
    const history = await (await page.request.get(`${base}/history?max_items=1`)).json();
    last = Object.values(history).at(-1);
    if (last?.status?.status_str === 'error') break;
  }
  say('queued from the page', last?.status?.status_str === 'success', JSON.stringify(last?.status));
}

async function reportOnNode() {
  await run(page, 'Comfy.Canvas.FitView');
  await page.waitForTimeout(1500);
  const shown = await page.evaluate((id) => {
    const node = window.app.graph.getNodeById(Number(id));
    return { widgets: (node.widgets ?? []).map((widget) => String(widget.value)),
      images: (node.imgs ?? []).length || (window.app.nodeOutputs?.[id]?.images ?? []).length };
  }, tiny.node);
  const written = await page.getByText(tiny.text, { exact: false }).count();
  const onNode = shown.widgets.some((value) => value.includes(tiny.text)) || written > 0;
  say('the text is on the node', onNode, JSON.stringify(shown));
  say('the text is in the page', written > 0, tiny.text);
  const breaks = await page.getByText(tiny.text, { exact: false }).first().locator('br').count();
  say('the text keeps its lines', breaks > 0, String(breaks));
  say('the picture is on the node', shown.images > 0, JSON.stringify(shown));
  await page.screenshot({ path: pictureFile });
}

async function help() {
  await page.evaluate((id) => {
    const node = window.app.graph.getNodeById(Number(id));
    window.app.canvas.selectNode?.(node) ?? window.app.canvas.select?.(node);
  }, tiny.node);
  await page.waitForTimeout(500);
  const button = page.getByTestId('info-button');
  if (await button.count()) await button.first().click();
  const words = page.getByText(tiny.help, { exact: false });
  const visible = await words.first().waitFor({ timeout: 10000 }).then(() => true, () => false);
  say('the help page opens', visible, tiny.help);
}

async function templateBrowser() {
  await run(page, 'Comfy.BrowseTemplates');
  const dialog = page.getByRole('dialog');
  await dialog.getByText('slipstream', { exact: true }).first().click({ timeout: 20000 });
  for (const { name } of templates) {
    const card = dialog.getByText(name, { exact: true }).first();
    const visible = await card.waitFor({ timeout: 10000 }).then(() => true, () => false);
    say(`${name}: in the template browser`, visible);
  }
  await page.waitForTimeout(1500);
  const broken = await page.evaluate(() => [...document.querySelectorAll('[role=dialog] img')]
    .filter((image) => image.complete && image.naturalWidth === 0).map((image) => image.src));
  say('every template has its picture', broken.length === 0, broken.join());
}

for (const part of [graphs, queue, reportOnNode, help, templateBrowser]) {
  try {
    await part();
  } catch (error) {
    say(`${part.name} got through`, false, String(error));
  }
}
say('no page errors', errors.length === 0, JSON.stringify(errors));
await browser.close();
