// Keeps the rows whose `distance` is at least `miles`: the plugin of long_haul.wat in AssemblyScript, from
// guest-sdk/ABI.md.
//
//   asc long_haul_as.ts -O3 --runtime stub --use abort= -o long_haul_as.wasm
//   tidegate plugin attach long_haul_as.wasm --manifest manifest.jsonl
//
// (tests/setup.sh does both where asc is there.)

// @ts-ignore: decorator
@external("tidegate", "fail")
declare function fail(index: i32, text: usize, len: i32): void;

const MAX_HANDLES: u32 = 4000;

/** 16 bytes a handle: +0 in use, +4 column id, +8 miles. */
let handles: usize = 0;
let base: usize = 0;

export function tg_abi(): u32 {
  return 1;
}

export function tg_window(len: u32): u32 {
  handles = heap.alloc(16 * MAX_HANDLES);
  memory.fill(handles, 0, 16 * MAX_HANDLES);
  // The allocator aligns to 16 bytes: take more, and round up.
  base = (heap.alloc(len + 65535) + 65535) & ~65535;
  return <u32>base;
}

export function tg_configure(configure: u32): u64 {
  for (let i: u32 = 0; i < MAX_HANDLES; i++) {
    const handle = handles + 16 * i;
    if (load<u32>(handle)) continue;
    const at = base + configure;
    store<u32>(handle, 1);
    store<u32>(handle + 4, load<u16>(base + load<u32>(at + 16)));
    store<i64>(handle + 8, load<i64>(base + load<u32>(at + 4)));
    return i;
  }
  const text = String.UTF8.encode("too many parameter sets");
  fail(-1, changetype<usize>(text), text.byteLength);
  return u64.MAX_VALUE;
}

export function tg_release(handle: u32): void {
  if (handle < MAX_HANDLES) store<u32>(handles + 16 * handle, 0);
}

// @ts-ignore: decorator
@inline
function keep(handle: usize, descriptor: usize): bool {
  const column = load<u32>(handle + 4);
  // A column that the image does not have yet is NULL, and NULL is not far.
  if (column >= load<u32>(descriptor + 12)) return false;
  if (!((load<u8>(base + load<u32>(descriptor) + column / 8) >> <u8>(column % 8)) & 1)) return false;
  return load<i64>(base + load<u32>(descriptor + 4) + 8 * column) >= load<i64>(handle + 8);
}

export function tg_filter(handle: u32, descriptors: u32, n: u32): u64 {
  let kept: u64 = 0;
  for (let i: u32 = 0; i < n; i++) {
    if (keep(handles + 16 * handle, base + descriptors + 16 * i)) kept |= <u64>1 << i;
  }
  return kept;
}
