// Keeps the rows whose `distance` is at least `miles`: the plugin of long_haul.wat in C, from guest-sdk/ABI.md.
//
//   clang --target=wasm32 -O2 -nostdlib -Wl,--no-entry -Wl,--export=tg_abi … long_haul_c.c -o long_haul_c.wasm
//   tidegate plugin attach long_haul_c.wasm --manifest manifest.jsonl
//
// (tests/setup.sh does both where clang and wasm-ld are there.)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

__attribute__((import_module("tidegate"), import_name("fail"))) void fail(int index, const char *text, u32 len);

#define PAGE 65536u
#define MAX_HANDLES 4000

struct handle {
    u32 used;
    u32 column;
    i64 miles;
};

static struct handle handles[MAX_HANDLES];
static u32 window;

// The window is not aligned: every load goes through memcpy, which becomes one instruction.
#define LOAD(type, offset) \
    ({ type value; __builtin_memcpy(&value, (const void *)(window + (offset)), sizeof value); value; })

u32 tg_abi(void) { return 1; }

// Pages that memory.grow adds are aligned and nobody else's.
u32 tg_window(u32 len) {
    u32 page = __builtin_wasm_memory_grow(0, (len + PAGE - 1) / PAGE);
    if (page == (u32)-1)
        return 0;
    window = page * PAGE;
    return window;
}

u64 tg_configure(u32 configure) {
    for (u32 i = 0; i < MAX_HANDLES; i++) {
        if (handles[i].used)
            continue;
        handles[i].used = 1;
        // The first column read: its id, at the offset in field +16. The first parameter: its slot, at that in field +4.
        handles[i].column = LOAD(u16, LOAD(u32, configure + 16));
        handles[i].miles = LOAD(i64, LOAD(u32, configure + 4));
        return i;
    }
    static const char text[] = "too many parameter sets";
    fail(-1, text, sizeof text - 1);
    return (u64)-1;
}

void tg_release(u32 handle) {
    if (handle < MAX_HANDLES)
        handles[handle].used = 0;
}

static int keep(const struct handle *handle, u32 descriptor) {
    u32 column = handle->column;
    // A column that the image does not have yet is NULL, and NULL is not far.
    if (column >= LOAD(u32, descriptor + 12))
        return 0;
    if (!(LOAD(u8, LOAD(u32, descriptor) + column / 8) >> (column % 8) & 1))
        return 0;
    return LOAD(i64, LOAD(u32, descriptor + 4) + 8 * column) >= handle->miles;
}

u64 tg_filter(u32 handle, u32 descriptors, u32 n) {
    u64 kept = 0;
    for (u32 i = 0; i < n; i++)
        kept |= (u64)keep(&handles[handle], descriptors + 16 * i) << i;
    return kept;
}
