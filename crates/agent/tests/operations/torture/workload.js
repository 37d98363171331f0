// Computes, in answer to each line, what depends on all lines before. Hot loops keep the just-in-time
// compiler busy, garbage the collector, timers the event loop.
'use strict';
const crypto = require('crypto');
const readline = require('readline');

let state = Number(process.argv[2]) >>> 0;
const next = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state;
};
const index = new Map();
const blobs = Array.from({ length: 200 }, () => Buffer.alloc(4096, next() & 0xff));
const numbers = new Float64Array(50000).map(() => next() / 7);
let ring = null;
let ticks = 0;
setInterval(() => { ticks += JSON.parse(JSON.stringify({ a: [1, 2, 3] })).a.length; }, 1);

function hot(n) {
  let total = 0;
  for (let i = 0; i < numbers.length; i++) {
    numbers[i] = (numbers[i] * 1.000001 + n) % 100003;
    total += numbers[i];
  }
  return total;
}

function work(n) {
  for (let k = 0; k < 500; k++) {
    const key = `k${next() % 3000}`;
    index.set(key, (index.get(key) || 0) + n * k);
  }
  const at = next() % blobs.length;
  blobs[at] = Buffer.from(crypto.createHash('sha512').update(blobs[at]).digest('hex').repeat(32));
  for (let k = 0; k < 2000; k++) {
    const a = { k, text: `text ${k}` };
    a.self = a;
  }
  ring = { value: n, next: ring };
  let sum = 0;
  for (let node = ring; node; node = node.next) sum = (Math.imul(sum, 31) + node.value) >>> 0;
  const hash = crypto.createHash('sha256');
  for (const blob of blobs) hash.update(blob);
  for (const [key, value] of [...index].sort()) hash.update(`${key}=${value};`);
  return `${n} ${sum} ${hot(n).toFixed(6)} ${hash.digest('hex')}`;
}

const lines = readline.createInterface({ input: process.stdin });
lines.on('line', (line) => process.stdout.write(work(Number(line)) + '\n'));
lines.on('close', () => process.exit(0));
process.stdout.write('ready\n');
