// What llama.cpp writes after a prompt, greedily, and by how much the best token of each place was likelier than the second.
//
//   node greedy.mjs NODE_MODULES FILE.gguf PROMPT TOKENS       prints [[piece, ...], [ratio, ...]]
const [modules, modelPath, prompt, tokens] = process.argv.slice(2);
const {getLlama} = await import(`file://${modules}/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 256, threads: 1});
const sequence = context.getSequence(), pieces = [], ratios = [];
let input = model.tokenize(prompt, true);
while (pieces.length < Number(tokens)) {
  const last = [input.at(-1), {generateNext: {probabilities: true, options: {temperature: 0}}}];
  const {next} = (await sequence.controlledEvaluate([...input.slice(0, -1), last])).at(-1);
  const [[token, best], [, second]] = [...next.probabilities.entries()];
  if (model.isEogToken(token)) break;
  pieces.push(model.detokenize([token], true));
  ratios.push(best / second);
  input = [token];
}
console.log(JSON.stringify([pieces, ratios]));
process.exit(0);
