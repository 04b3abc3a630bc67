//! Random guests: valid modules of ABI 1 as text, typed expressions all through, that do anything with memory, window,
//! table, imports and each other. What no compiler would make of a plugin, and what the validator has nothing against.
//!
//! Wild addresses, lengths and divisors are seldom: a guest that traps at its first instruction does nothing else.

use std::fmt::Write;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

const TYPES: [&str; 4] = ["i32", "i64", "f32", "f64"];

/// Expressions of one function: it may nest, but the guest stays one of some kilobytes.
const BUDGET: u32 = 120;
const HELPERS: usize = 6;

const INTEGER_OPS: [&str; 15] = [
    "add", "sub", "mul", "div_s", "div_u", "rem_s", "rem_u", "and", "or", "xor", "shl", "shr_s", "shr_u", "rotl",
    "rotr",
];
const FLOAT_OPS: [&str; 7] = ["add", "sub", "mul", "div", "min", "max", "copysign"];
const INTEGER_UNARY: [&str; 5] = ["clz", "ctz", "popcnt", "extend8_s", "extend16_s"];
const FLOAT_UNARY: [&str; 7] = ["abs", "neg", "ceil", "floor", "trunc", "nearest", "sqrt"];
const INTEGER_TESTS: [&str; 10] = ["eq", "ne", "lt_s", "lt_u", "gt_s", "gt_u", "le_s", "le_u", "ge_s", "ge_u"];
const FLOAT_TESTS: [&str; 6] = ["eq", "ne", "lt", "gt", "le", "ge"];

/// To, instruction, from.
const CONVERSIONS: [(&str, &str, &str); 15] = [
    ("i32", "i32.wrap_i64", "i64"),
    ("i32", "i32.trunc_sat_f32_u", "f32"),
    ("i32", "i32.trunc_sat_f64_s", "f64"),
    ("i32", "i32.reinterpret_f32", "f32"),
    ("i64", "i64.extend_i32_s", "i32"),
    ("i64", "i64.extend_i32_u", "i32"),
    ("i64", "i64.trunc_sat_f64_s", "f64"),
    ("i64", "i64.reinterpret_f64", "f64"),
    ("f32", "f32.demote_f64", "f64"),
    ("f32", "f32.convert_i64_u", "i64"),
    ("f32", "f32.reinterpret_i32", "i32"),
    ("f64", "f64.promote_f32", "f32"),
    ("f64", "f64.convert_i32_s", "i32"),
    ("f64", "f64.reinterpret_i64", "i64"),
    ("i32", "i32x4.extract_lane 1 (i32x4.splat", "i32"),
];

/// A guest as WebAssembly text.
pub fn guest(random: &mut StdRng) -> Vec<u8> {
    let mut program = Program { random, budget: BUDGET, labels: 0, helper: true };
    program.module().into_bytes()
}

struct Program<'r> {
    random: &'r mut StdRng,
    budget: u32,
    labels: u32,
    /// Whether this is one of the functions that others call: it seldom calls any, or calling would never end.
    helper: bool,
}

impl Program<'_> {
    fn module(&mut self) -> String {
        let kinds = ["row_filter", "row_transform", "change_filter", "change_transform"];
        let kind = *kinds.choose(self.random).expect("there are kinds");
        let mut text = String::from(
            r#"(module
  (import "tidegate" "log" (func $log (param i32 i32 i32)))
  (import "tidegate" "metric" (func $metric (param i32 i32 f64)))
  (import "tidegate" "fail" (func $fail (param i32 i32 i32)))
  (memory (export "memory") 1)
  (global $window (mut i32) (i32.const 0))
"#,
        );
        for ty in TYPES {
            let _ = writeln!(text, "  (global $g_{ty} (mut {ty}) ({ty}.const 1))");
            let _ = writeln!(text, "  (type $t_{ty} (func (param i32 i64) (result {ty})))");
        }
        let _ = writeln!(text, r#"  (@custom "tidegate" "{{\"plugin\":{{\"abi\":1,\"kind\":\"{kind}\"}}}}\n")"#);
        for helper in 0..HELPERS {
            let ty = TYPES[helper % TYPES.len()];
            let body = self.body(ty);
            let _ = writeln!(text, "  (func $h{helper} (param $a i32) (param $b i64) (result {ty}) {body})");
        }
        let names: String = (0..HELPERS).map(|helper| format!(" $h{helper}")).collect();
        let _ = writeln!(text, "  (table {HELPERS} funcref) (elem (i32.const 0){names})");
        let _ = writeln!(text, "  (data (i32.const 0) \"{}\")", self.data());
        text.push_str(&self.exports(kind));
        text.push(')');
        text
    }

    /// What the host calls: honest mostly, or nothing of the guest would ever run.
    fn exports(&mut self, kind: &str) -> String {
        self.helper = false;
        let abi = if self.random.random_bool(0.95) { "(i32.const 1)".to_owned() } else { self.body("i32") };
        let window = if self.random.random_bool(0.9) {
            "(global.set $window (i32.shl (memory.grow (i32.shr_u (local.get $a) (i32.const 16))) (i32.const 16))) (global.get $window)"
                .to_owned()
        } else {
            self.body("i32")
        };
        // The schema of a transform: one column `x`, BIGINT. Written when it is asked for, as memory may hold anything.
        let schema = "(i32.store (i32.const 512) (i32.const 8)) (i64.store (i32.const 516) (i64.const 0x0001037801000001)) \
                      (i64.const 0x20000000001)";
        let configure = if self.random.random_bool(0.2) {
            self.body("i64")
        } else if kind.ends_with("transform") {
            schema.to_owned()
        } else {
            "(i64.const 7)".to_owned()
        };
        let run = if kind.ends_with("filter") { "tg_filter" } else { "tg_transform" };
        let answer = self.body("i64");
        let masked = "(i64.shr_u (i64.const -1) (i64.sub (i64.const 64) (i64.extend_i32_u (local.get $n))))";
        let answer = if self.random.random_bool(0.7) {
            format!("(i64.and {masked} (block (result i64) {answer}))")
        } else {
            answer
        };
        let start = match self.random.random_range(0..12) {
            0 => format!("(func $start (local $a i32) (local $b i64) {}) (start $start)", self.statements()),
            1 => "(func (export \"_initialize\") (drop (call $h0 (i32.const 1) (i64.const 2))))".to_owned(),
            _ => String::new(),
        };
        format!(
            r#"  (func (export "tg_abi") (result i32) (local $a i32) (local $b i64) {abi})
  (func (export "tg_window") (param $a i32) (result i32) (local $b i64) {window})
  (func (export "tg_configure") (param $a i32) (result i64) (local $b i64) {configure})
  (func (export "tg_release") (param i32))
  (func (export "{run}") (param $a i32) (param $d i32) (param $n i32) (result i64) (local $b i64) {answer})
  {start}"#
        )
    }

    /// Bytes of a data segment.
    fn data(&mut self) -> String {
        (0..self.random.random_range(0..64)).map(|_| format!("\\{:02x}", self.random.random::<u8>())).collect()
    }

    /// Statements and a value, where `$a` is an i32 and `$b` an i64.
    fn body(&mut self, ty: &str) -> String {
        self.budget = BUDGET;
        format!("{} {}", self.statements(), self.expression(ty, 5))
    }

    fn statements(&mut self) -> String {
        let count = self.random.random_range(0..4);
        (0..count).map(|_| self.statement()).collect::<Vec<_>>().join(" ")
    }

    fn statement(&mut self) -> String {
        let ty = *TYPES.choose(self.random).expect("there are types");
        match self.random.random_range(0..14) {
            0 | 1 => {
                format!("({ty}.store offset={} {} {})", self.offset(), self.address(3), self.expression(ty, 3))
            }
            2 | 3 => format!("(local.set $a {})", self.expression("i32", 4)),
            4 => format!("(local.set $b {})", self.expression("i64", 4)),
            5 | 6 => format!("(global.set $g_{ty} {})", self.expression(ty, 4)),
            7 => format!("(drop {})", self.expression(ty, 4)),
            8 => {
                let operation = *["memory.fill", "memory.copy"].choose(self.random).expect("there are two");
                format!("({operation} {} {} {})", self.address(2), self.address(2), self.length())
            }
            9 => {
                let import = *["$log", "$log", "$log", "$fail"].choose(self.random).expect("there are some");
                format!("(call {import} {} {} {})", self.expression("i32", 1), self.address(1), self.length())
            }
            10 => format!("(call $metric (i32.const 0) {} {})", self.length(), self.expression("f64", 2)),
            11 => format!("(if {} (then {}))", self.expression("i32", 3), self.nested()),
            12 => {
                let label = self.label();
                // Ends or not: that is what deadlines are for.
                format!("(loop $l{label} {} (br_if $l{label} {}))", self.nested(), self.expression("i32", 3))
            }
            _ if self.random.random_bool(0.1) => "unreachable".to_owned(),
            _ => "nop".to_owned(),
        }
    }

    fn nested(&mut self) -> String {
        if self.spend(10) { self.statement() } else { String::new() }
    }

    fn expression(&mut self, ty: &str, depth: u32) -> String {
        if depth == 0 || !self.spend(1) {
            return self.leaf(ty);
        }
        let down = depth - 1;
        let integer = ty.starts_with('i');
        match self.random.random_range(0..13) {
            0..3 => self.operation(ty, down),
            3 => {
                let op = *(if integer { &INTEGER_UNARY[..] } else { &FLOAT_UNARY[..] })
                    .choose(self.random)
                    .expect("there are some");
                format!("({ty}.{op} {})", self.expression(ty, down))
            }
            4 => format!(
                "(if (result {ty}) {} (then {}) (else {}))",
                self.expression("i32", down),
                self.expression(ty, down),
                self.expression(ty, down)
            ),
            5 => {
                let label = self.label();
                format!(
                    "(block $l{label} (result {ty}) (br_if $l{label} {} {}))",
                    self.expression(ty, down),
                    self.expression("i32", down)
                )
            }
            6 | 7 => format!("({ty}.load offset={} {})", self.offset(), self.address(down)),
            8 => self.conversion(ty, down),
            9 => self.call(ty, down),
            10 => format!(
                "(select {} {} {})",
                self.expression(ty, down),
                self.expression(ty, down),
                self.expression("i32", down)
            ),
            11 if ty == "i32" => self.test(down),
            12 if ty == "i32" => format!("(memory.grow {})", self.length()),
            _ => self.leaf(ty),
        }
    }

    fn operation(&mut self, ty: &str, down: u32) -> String {
        let integer = ty.starts_with('i');
        let operations = if integer { &INTEGER_OPS[..] } else { &FLOAT_OPS[..] };
        let operation = *operations.choose(self.random).expect("there are some");
        let (one, mut two) = (self.expression(ty, down), self.expression(ty, down));
        let divides = integer && (operation.starts_with("div") || operation.starts_with("rem"));
        if divides && self.random.random_bool(0.9) {
            two = format!("({ty}.or {two} ({ty}.const 1))");
        }
        format!("({ty}.{operation} {one} {two})")
    }

    /// An i32 that says how two values compare.
    fn test(&mut self, down: u32) -> String {
        let ty = *TYPES.choose(self.random).expect("there are types");
        let tests = if ty.starts_with('i') { &INTEGER_TESTS[..] } else { &FLOAT_TESTS[..] };
        let test = *tests.choose(self.random).expect("there are some");
        format!("({ty}.{test} {} {})", self.expression(ty, down), self.expression(ty, down))
    }

    fn conversion(&mut self, ty: &str, down: u32) -> String {
        let fitting: Vec<_> = CONVERSIONS.iter().filter(|(to, ..)| *to == ty).collect();
        let (_, instruction, from) = **fitting.choose(self.random).expect("each type has some");
        let closed = ")".repeat(instruction.matches('(').count());
        format!("({instruction} {}{closed})", self.expression(from, down))
    }

    /// Of a helper, by its name or by its place in the table, where it may be of another type.
    fn call(&mut self, ty: &str, down: u32) -> String {
        if self.helper && self.random.random_bool(0.9) {
            return self.leaf(ty);
        }
        let (a, b) = (self.expression("i32", down), self.expression("i64", down));
        let helper = TYPES.iter().position(|known| *known == ty).expect("one of the types");
        if self.random.random_bool(0.5) {
            return format!("(call $h{helper} {a} {b})");
        }
        let place =
            if self.random.random_bool(0.9) { format!("(i32.const {helper})") } else { self.expression("i32", 1) };
        format!("(call_indirect (type $t_{ty}) {a} {b} {place})")
    }

    /// Mostly somewhere in the memory that there is from the beginning.
    fn address(&mut self, depth: u32) -> String {
        let anywhere = self.expression("i32", depth);
        if self.random.random_bool(0.95) { format!("(i32.and {anywhere} (i32.const 0x7fff))") } else { anywhere }
    }

    fn length(&mut self) -> String {
        if self.random.random_bool(0.95) {
            format!("(i32.const {})", self.random.random_range(0..64))
        } else {
            self.expression("i32", 1)
        }
    }

    fn leaf(&mut self, ty: &str) -> String {
        match self.random.random_range(0..4) {
            0 => format!("(global.get $g_{ty})"),
            1 if ty == "i32" => "(global.get $window)".to_owned(),
            2 if ty == "i32" => "(local.get $a)".to_owned(),
            2 if ty == "i64" => "(local.get $b)".to_owned(),
            3 if ty == "i32" => "(memory.size)".to_owned(),
            _ => self.constant(ty),
        }
    }

    fn constant(&mut self, ty: &str) -> String {
        let special = ["nan", "inf", "-inf", "-0.0", "0x1p-149", "1e30", "2.5", "-1.0"];
        match ty {
            "i32" => self.integer(),
            "i64" => format!("(i64.const {})", self.random.random::<i64>() >> self.random.random_range(0..64u32)),
            _ => format!("({ty}.const {})", special.choose(self.random).expect("there are some")),
        }
    }

    fn integer(&mut self) -> String {
        format!("(i32.const {})", self.random.random::<i32>() >> self.random.random_range(0..32u32))
    }

    fn offset(&mut self) -> u32 {
        if self.random.random_bool(0.95) { self.random.random_range(0..256) } else { self.random.random() }
    }

    fn label(&mut self) -> u32 {
        self.labels += 1;
        self.labels
    }

    /// Whether there is so much left.
    fn spend(&mut self, amount: u32) -> bool {
        let left = self.budget.checked_sub(amount);
        self.budget = left.unwrap_or(0);
        left.is_some()
    }
}
