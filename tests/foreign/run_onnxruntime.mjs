// Runs one graph in onnxruntime-web (WebAssembly) or onnxruntime-node.
//
//   node run_onnxruntime.mjs PACKAGE ORDER
//
// PACKAGE is the folder of the installed npm package. ORDER is a JSON file
// {"model", "inputs": [{"name", "dtype", "shape", "file"}], "output"}. The first output is written to
// "output" as raw float32; a refusal is one line on stderr and exit status 1.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const [folder, orderFile] = process.argv.slice(2);
const ort = createRequire(import.meta.url)(folder);
const order = JSON.parse(readFileSync(orderFile, 'utf8'));
const arrays = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

try {
  if (ort.env.wasm) ort.env.wasm.numThreads = 1;
  const options = { executionProviders: [folder.endsWith('-web') ? 'wasm' : 'cpu'] };
  const session = await ort.InferenceSession.create(readFileSync(order.model), options);
  const feeds = {};
  for (const { name, dtype, shape, file } of order.inputs) {
    const bytes = readFileSync(file);
    const copy = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
    feeds[name] = new ort.Tensor(dtype, new arrays[dtype](copy), shape);
  }
  const results = await session.run(feeds);
  const { data } = results[session.outputNames[0]];
  writeFileSync(order.output, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
} catch (error) {
  console.error(String(error.message ?? error).split('\n')[0].slice(0, 300));
  process.exitCode = 1;
}
