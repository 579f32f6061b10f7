// Numbers as people read them: three digits and a unit. As in units.py.

function digits(x) {
  const places = Math.max(3 - String(Math.trunc(Math.abs(x))).length, 0);
  return x.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
}

function scaled(n, scales, otherwise) {
  for (const [scale, unit] of scales) if (Math.abs(n) >= scale) return `${digits(n / scale)} ${unit}`;
  return otherwise;
}

const count = (n) => Math.round(n).toLocaleString("en-US");
const bytesText = (n) => scaled(n, [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]], `${count(n)} B`);
const flopsText = (n) => scaled(n, [[1e15, "PFLOP"], [1e12, "TFLOP"], [1e9, "GFLOP"], [1e6, "MFLOP"], [1e3, "kFLOP"]], `${count(n)} FLOP`);
const secondsText = (n) => scaled(n, [[1, "s"], [1e-3, "ms"], [1e-6, "us"]], n ? `${digits(n / 1e-9)} ns` : "0 s");
const percentText = (share) => `${(share * 100).toFixed(1)}%`;
const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
const blank = (n, text) => (n ? text(n) : "");
