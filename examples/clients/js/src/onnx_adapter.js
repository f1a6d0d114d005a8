// Reads .onnx_adapter files, ONNX Runtime's own format: a flatbuffer whose offsets are all checked.
//
//     table Adapter   { format_version: int; adapter_version: int; model_version: int; parameters: [Parameter]; }
//     table Parameter { name: string; dims: [int64]; data_type: int; raw_data: [uint8]; }

const IDENTIFIER = "TORT";
const FORMAT_VERSION = 1;
const LARGEST_RANK = 8;
// ONNX's dtype numbers: the dtype's name, and the array type of its values.
const DTYPES = { 1: ["float32", Float32Array], 7: ["int64", BigInt64Array], 10: ["float16", Uint16Array] };

/** The side inputs in `file`, a Map of name → { dtype, shape, data }. */
export function readOnnxAdapter(file, where, Problem) {
  const refuse = (problem) => {
    throw new Problem(`${where} is truncated or not an .onnx_adapter file: ${problem}`);
  };
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const within = (at, length) => {
    if (!(at >= 0 && length >= 0 && at + length <= file.length)) refuse(`an offset leads to ${at}`);
    return at;
  };
  const uint = (at) => view.getUint32(within(at, 4), true);
  const int = (at) => view.getInt32(within(at, 4), true);
  const short = (at) => view.getUint16(within(at, 2), true);

  // The position of the field `index` of the table at `table`; null if the field is absent.
  const field = (table, index) => {
    const fields = table - int(table);
    const place = 4 + 2 * index;
    const offset = place + 2 <= short(fields) ? short(fields + place) : 0;
    return offset ? table + offset : null;
  };
  const at = (place) => place + uint(place);
  const vector = (place, size) => {
    if (place === null) return [0, 0];
    const start = at(place);
    const count = uint(start);
    return [within(start + 4, count * size), count];
  };

  if (file.length < 8) refuse(`it has ${file.length} bytes`);
  if (new TextDecoder().decode(file.subarray(4, 8)) !== IDENTIFIER) refuse("its identifier is missing");
  const root = at(0);
  const version = field(root, 0);
  if (version === null || int(version) !== FORMAT_VERSION) refuse("its format version is not supported");
  const found = new Map();
  const [list, count] = vector(field(root, 3), 4);
  for (let index = 0; index < count; ++index) {
    const table = at(list + 4 * index);
    const [nameAt, nameLength] = vector(field(table, 0), 1);
    const [dimsAt, rank] = vector(field(table, 1), 8);
    const kind = field(table, 2);
    const [dataAt, length] = vector(field(table, 3), 1);
    const name = new TextDecoder().decode(file.subarray(nameAt, nameAt + nameLength));
    if (rank > LARGEST_RANK) refuse(`${name} has ${rank} dimensions`);
    const shape = Array.from({ length: rank }, (_, axis) => Number(view.getBigInt64(dimsAt + 8 * axis, true)));
    const [dtype, Values] = DTYPES[kind === null ? 0 : int(kind)] ?? refuse(`the dtype of ${name}`);
    const size = shape.reduce((product, side) => product * side, Values.BYTES_PER_ELEMENT);
    if (shape.some((side) => !Number.isSafeInteger(side) || side < 0) || size !== length) {
      refuse(`${name} [${shape}] has ${length} bytes`);
    }
    if (found.has(name)) refuse(`${name} occurs twice`);
    const copy = file.slice(dataAt, dataAt + length).buffer;
    found.set(name, { dtype, shape, data: new Values(copy) });
  }
  return found;
}
