//! Plugins in WebAssembly text, for tests that need one of their own: what all have in common, around what each does.

/// The end of a filter's body: all of its `$n` are kept.
pub const KEEP_ALL: &str = "(i64.shr_u (i64.const -1) (i64.sub (i64.const 64) (i64.extend_i32_u (local.get $n))))";

/// A plugin. Its code may call `$fail` and `$log`, and has the window's place in `$window`.
pub struct Guest<'a> {
    pub abi: u32,
    /// Members of the manifest's first line beside `abi`: `,"kind":"change_filter"`.
    pub plugin: &'a str,
    /// More lines of the manifest.
    pub lines: &'a str,
    /// Body of `tg_configure`: what it answers, or what it does before it answers handle 1 and no output. The
    /// configuration lies at `$at` in the window.
    pub configure: &'a str,
    /// Fields of the module: data, functions, and those that the host calls.
    pub fields: &'a str,
}

impl Default for Guest<'_> {
    fn default() -> Self {
        Guest { abi: 1, plugin: "", lines: "", configure: "", fields: "" }
    }
}

impl Guest<'_> {
    pub fn bytes(&self) -> Vec<u8> {
        let Guest { abi, plugin, lines, configure, fields } = self;
        let manifest = format!("{{\"plugin\":{{\"abi\":{abi}{plugin}}}}}\n{lines}");
        let manifest = manifest.replace('"', "\\\"").replace('\n', "\\n");
        format!(
            r#"(module
  (import "tidegate" "fail" (func $fail (param i32 i32 i32)))
  (import "tidegate" "log" (func $log (param i32 i32 i32)))
  (memory (export "memory") 1)
  (global $window (mut i32) (i32.const 0))
  (@custom "tidegate" "{manifest}")
  (func (export "tg_abi") (result i32) (i32.const {abi}))
  (func (export "tg_window") (param $len i32) (result i32)
    (global.set $window (i32.shl (memory.grow (i32.shr_u (i32.add (local.get $len) (i32.const 65535)) (i32.const 16))) (i32.const 16)))
    (global.get $window))
  (func (export "tg_configure") (param $at i32) (result i64) {configure} (i64.const 1))
  (func (export "tg_release") (param i32))
  {fields})"#
        )
        .into_bytes()
    }
}

/// The filter function with this body: `$d` is where the descriptors lie in the window, `$n` how many there are.
pub fn filtering(body: &str) -> String {
    format!(r#"(func (export "tg_filter") (param $handle i32) (param $d i32) (param $n i32) (result i64) {body})"#)
}

/// A filter of rows that does only this.
pub fn filter(body: &str) -> Vec<u8> {
    Guest { fields: &filtering(body), ..Guest::default() }.bytes()
}
