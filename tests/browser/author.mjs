// Makes a GUI workflow from its API twin through the real frontend, so that what we ship is what
// ComfyUI itself saves, and a picture of it with the outputs of a run on its nodes:
//   node author.mjs PORT TWIN.json LAYOUT.json OUTPUTS.json OUT.json PICTURE.png
// LAYOUT has places, notes and model links; OUTPUTS has node id -> what the node shows.
import fs from 'fs';
import { canonical, loadGraph, open, run, toPrompt } from './page.mjs';

const [port, twinFile, layoutFile, outputsFile, outFile, pictureFile] = process.argv.slice(2);
const read = (file) => JSON.parse(fs.readFileSync(file, 'utf8'));
const twin = read(twinFile);
const layout = read(layoutFile);

// In the page: places, notes, model links, and seeds that stay what they are.
function arrange(layout) {
  const { app, LiteGraph } = window;
  const put = (node, [x, y, width, height]) => {
    node.pos = [x, y];
    node.setSize([width, height]);
  };
  for (const node of app.graph._nodes) {
    put(node, layout.places[node.id]);
    for (const widget of node.widgets ?? []) {
      if (widget.name === 'control_after_generate') widget.value = 'fixed';
    }
    if (node.type.startsWith('Slipstream')) node.properties.cnr_id = 'slipstream';
    if (layout.models[node.id]) node.properties.models = layout.models[node.id];
  }
  for (const { text, place } of layout.notes) {
    const note = LiteGraph.createNode('MarkdownNote');
    app.graph.add(note);
    put(note, place);
    note.widgets[0].value = text;
    note.title = layout.title;
  }
}

async function save(page) {
  await page.evaluate((prompt) => window.app.loadApiJson(prompt, 'from-api'), twin);
  await page.evaluate(arrange, layout);
  const workflow = await page.evaluate(async () => (await window.app.graphToPrompt()).workflow);
  workflow.id = layout.id;
  workflow.extra.ds = { scale: layout.scale, offset: layout.offset };
  await loadGraph(page, workflow);
  const [back, wanted] = [canonical(await toPrompt(page)), canonical(twin)];
  if (back !== wanted) throw new Error(`The saved graph is another prompt:\n${back}\n${wanted}`);
  fs.writeFileSync(outFile, `${JSON.stringify(workflow, null, 2)}\n`);
  return workflow;
}

async function draw(page, workflow) {
  await loadGraph(page, workflow);
  await page.evaluate((outputs) => {
    for (const [node, output] of Object.entries(outputs)) {
      window.app.api.dispatchCustomEvent('executed', { node, display_node: node, output });
    }
  }, read(outputsFile));
  await run(page, 'Workspace.ToggleFocusMode');
  await page.waitForTimeout(2000);
  const clip = await page.evaluate(() => { // the whole graph, as large as the page allows
    const { canvas, graph } = window.app;
    const boxes = graph._nodes.map((node) => node.getBounding());
    const left = Math.min(...boxes.map((box) => box[0]));
    const top = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2]));
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
    const margin = 30;
    const [width, height] = [window.innerWidth, window.innerHeight - 160]; // a toolbar is below
    const fits = [width / (right - left), height / (bottom - top)];
    canvas.ds.scale = 0.94 * Math.min(...fits);
    canvas.ds.offset = [margin - left, margin - top];
    canvas.setDirty(true, true);
    const size = (length) => Math.round((length + 2 * margin) * canvas.ds.scale);
    return { x: 0, y: 0, width: size(right - left), height: size(bottom - top) };
  });
  await page.waitForTimeout(2000);
  await page.screenshot({ path: pictureFile, clip });
}

for (const vue of [false, true]) {
  const size = vue ? { width: 2000, height: 1500 } : {};
  const { browser, page, errors } = await open(port, { vue, ...size });
  try {
    if (vue) await draw(page, read(outFile));
    else await save(page);
    if (errors.length) throw new Error(`page errors: ${JSON.stringify(errors)}`);
  } finally {
    await browser.close();
  }
}
