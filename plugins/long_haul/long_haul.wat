;; Keeps the rows whose `distance` is at least `miles`: a plugin by hand, from guest-sdk/ABI.md alone.
;;
;; Memory: a message at 0; from 1024 on, 16 bytes a handle, at most 4,000 so that they stay in the first page (1024 +
;; 4,000 * 16 = 65,024); then whatever pages memory.grow gives for the window.

(module
  (import "tidegate" "fail" (func $fail (param i32 i32 i32)))

  (memory (export "memory") 1)

  ;; One handle: +0 in use (1), +4 column id, +8 miles (i64).
  (global $handles i32 (i32.const 1024))
  (global $max_handles i32 (i32.const 4000))
  (global $window (mut i32) (i32.const 0))

  (data (i32.const 0) "too many parameter sets")

  (func (export "tg_abi") (result i32)
    i32.const 1)

  ;; Pages that memory.grow adds are 64 KiB-aligned and nobody else's.
  (func (export "tg_window") (param $len i32) (result i32)
    (local $page i32)
    (local.set $page
      (memory.grow (i32.shr_u (i32.add (local.get $len) (i32.const 0xffff)) (i32.const 16))))
    (if (i32.eq (local.get $page) (i32.const -1))
      (then (return (i32.const 0))))
    (global.set $window (i32.shl (local.get $page) (i32.const 16)))
    (global.get $window))

  (func (export "tg_configure") (param $configure i32) (result i64)
    (local $i i32)
    (local $handle i32)
    ;; A free handle.
    (loop $next
      (if (i32.eq (local.get $i) (global.get $max_handles))
        (then
          (call $fail (i32.const -1) (i32.const 0) (i32.const 23))
          (return (i64.const -1))))
      (local.set $handle (call $handle_at (local.get $i)))
      (if (i32.load (local.get $handle))
        (then
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          (br $next))))
    (local.set $configure (i32.add (global.get $window) (local.get $configure)))
    (i32.store (local.get $handle) (i32.const 1))
    ;; reads[0].column: a u16 at the offset that Configure +16 holds.
    (i32.store offset=4 (local.get $handle)
      (i32.load16_u align=1 (i32.add (global.get $window) (i32.load offset=16 (local.get $configure)))))
    ;; Parameter 0 has a default, so it is never NULL: its slot is at the offset that Configure +4 holds.
    (i64.store offset=8 (local.get $handle)
      (i64.load align=1 (i32.add (global.get $window) (i32.load offset=4 (local.get $configure)))))
    ;; The handle is the low half; a filter has no output schema, so the high half is 0.
    (i64.extend_i32_u (local.get $i)))

  (func (export "tg_release") (param $handle i32)
    (if (i32.lt_u (local.get $handle) (global.get $max_handles))
      (then (i32.store (call $handle_at (local.get $handle)) (i32.const 0)))))

  (func (export "tg_filter") (param $handle i32) (param $descriptors i32) (param $n i32) (result i64)
    (local $i i32)
    (local $kept i64)
    (local.set $handle (call $handle_at (local.get $handle)))
    (local.set $descriptors (i32.add (global.get $window) (local.get $descriptors)))
    (block $done
      (loop $row
        (br_if $done (i32.eq (local.get $i) (local.get $n)))
        (if (call $keep (local.get $handle) (local.get $descriptors))
          (then
            (local.set $kept
              (i64.or (local.get $kept) (i64.shl (i64.const 1) (i64.extend_i32_u (local.get $i)))))))
        (local.set $descriptors (i32.add (local.get $descriptors) (i32.const 16)))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br $row)))
    (local.get $kept))

  ;; Descriptor: +0 present, +4 slots, +8 heap, +12 columns.
  (func $keep (param $handle i32) (param $descriptor i32) (result i32)
    (local $column i32)
    (local.set $column (i32.load offset=4 (local.get $handle)))
    ;; A column that the image does not have yet is NULL, and NULL is not far.
    (if (i32.ge_u (local.get $column) (i32.load offset=12 (local.get $descriptor)))
      (then (return (i32.const 0))))
    (if (i32.eqz
          (i32.and
            (i32.shr_u
              (i32.load8_u
                (i32.add
                  (i32.add (global.get $window) (i32.load (local.get $descriptor)))
                  (i32.shr_u (local.get $column) (i32.const 3))))
              (i32.and (local.get $column) (i32.const 7)))
            (i32.const 1)))
      (then (return (i32.const 0))))
    (i64.ge_s
      (i64.load align=1
        (i32.add
          (i32.add (global.get $window) (i32.load offset=4 (local.get $descriptor)))
          (i32.shl (local.get $column) (i32.const 3))))
      (i64.load offset=8 (local.get $handle))))

  (func $handle_at (param $handle i32) (result i32)
    (i32.add (global.get $handles) (i32.shl (local.get $handle) (i32.const 4))))

  (@custom "tidegate"
    "{\"plugin\":{\"abi\":1,\"name\":\"long_haul\",\"doc\":\"Keeps flights of at least so many miles.\"}}\n"
    "{\"param\":{\"name\":\"miles\",\"type\":\"int\",\"default\":\"1000\",\"doc\":\"The shortest flight to keep, in miles.\"}}\n"
    "{\"column\":{\"name\":\"distance\",\"type\":\"int\"}}\n"))
