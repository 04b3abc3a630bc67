//! Damaged modules: samples whose sections were cut, swapped, taken from each other, whose lengths, numbers, types,
//! functions and instructions were changed, and heaps of sections that were never a module. Lengths are made right
//! again after most changes, or nothing behind the first would ever be looked at.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

const HEAD: &[u8] = b"\0asm\x01\0\0\0";
const CUSTOM: u8 = 0;
const TYPE: u8 = 1;
const EXPORT: u8 = 7;
const CODE: u8 = 10;
/// Value types, and bytes that are none.
const VALUE_TYPES: [u8; 9] = [0x7f, 0x7e, 0x7d, 0x7c, 0x7b, 0x70, 0x6f, 0x40, 0x00];
/// Numbers at which something ends.
const NUMBERS: [u32; 12] = [0, 1, 2, 63, 64, 127, 128, 65_535, 65_536, 0x7fff_ffff, 0x8000_0000, u32::MAX];
/// Instructions that do something by themselves, or take what follows for their operand.
const INSTRUCTIONS: [&[u8]; 14] = [
    &[0x00],
    &[0x01],
    &[0x03, 0x40, 0x0c, 0x00, 0x0b],
    &[0x02, 0x40],
    &[0x0b],
    &[0x0f],
    &[0x10, 0x00],
    &[0x10, 0x05],
    &[0x1a],
    &[0x20, 0x00],
    &[0x21, 0x01],
    &[0x41, 0x7f],
    &[0x41, 0x01, 0x40, 0x00, 0x1a],
    &[0x41, 0x00, 0x41, 0x7f, 0x36, 0x02, 0x00],
];

/// One section: its id, and what follows its length.
#[derive(Clone)]
struct Section {
    id: u8,
    content: Vec<u8>,
}

/// A module made of one of the samples, or of nothing.
pub fn module(random: &mut StdRng, samples: &[Vec<u8>]) -> Vec<u8> {
    let sample = samples.choose(random).expect("there are samples");
    if !sample.starts_with(HEAD) {
        return text(random, sample);
    }
    if random.random_bool(0.1) {
        return assemble(&heap(random));
    }
    let mut sections = sections(sample);
    for _ in 0..random.random_range(1..=3) {
        change(random, &mut sections, samples);
    }
    let mut module = assemble(&sections);
    if random.random_bool(0.15) {
        damage(random, &mut module);
    }
    module
}

/// Text with a word left out, doubled, or replaced by one from elsewhere.
fn text(random: &mut StdRng, sample: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(sample);
    let mut words: Vec<&str> = text.split_inclusive([' ', '\n']).collect();
    for _ in 0..random.random_range(1..=3) {
        let (at, other) = (random.random_range(0..words.len()), random.random_range(0..words.len()));
        match random.random_range(0..3) {
            0 => {
                words.remove(at);
            }
            1 => words.insert(at, words[at]),
            _ => words[at] = words[other],
        }
    }
    words.concat().into_bytes()
}

fn sections(module: &[u8]) -> Vec<Section> {
    let (mut at, mut sections) = (HEAD.len(), Vec::new());
    while at < module.len() {
        let id = module[at];
        at += 1;
        let len = read(module, &mut at).expect("a sample is whole") as usize;
        sections.push(Section { id, content: module[at..at + len].to_vec() });
        at += len;
    }
    sections
}

fn assemble(sections: &[Section]) -> Vec<u8> {
    let mut module = HEAD.to_vec();
    for Section { id, content } in sections {
        module.push(*id);
        module.extend(leb(content.len() as u32));
        module.extend(content);
    }
    module
}

/// Sections of any kind, in any order.
fn heap(random: &mut StdRng) -> Vec<Section> {
    (0..random.random_range(0..12)).map(|_| any_section(random)).collect()
}

/// A number of entries, and noise.
fn any_section(random: &mut StdRng) -> Section {
    let mut content = leb(*NUMBERS.choose(random).expect("there are some"));
    let noise = random.random_range(0..64);
    content.extend((0..noise).map(|_| random.random::<u8>()));
    Section { id: random.random_range(0..=13), content }
}

/// One change to the sections. Where it finds nothing to change, nothing is.
fn change(random: &mut StdRng, sections: &mut Vec<Section>, samples: &[Vec<u8>]) {
    if sections.is_empty() {
        return;
    }
    let (at, other) = (random.random_range(0..sections.len()), random.random_range(0..sections.len()));
    match random.random_range(0..16) {
        0 => drop(sections.remove(at)),
        1 => sections.insert(other, sections[at].clone()),
        2 => sections.swap(at, other),
        3 => {
            let content = &mut sections[at].content;
            content.truncate(random.random_range(0..=content.len()));
        }
        4 | 5 => damage(random, &mut sections[at].content),
        6 => number(random, &mut sections[at].content),
        7 => donate(random, sections, samples),
        8 => in_section(sections, TYPE, |content| replace_any(random, content, &VALUE_TYPES)),
        9 => in_section(sections, EXPORT, |content| damage(random, content)),
        10 => custom(random, sections, other),
        11 => in_bodies(sections, |bodies| drop(bodies.remove(random.random_range(0..bodies.len())))),
        12 => in_bodies(sections, |bodies| {
            let (one, two) = (random.random_range(0..bodies.len()), random.random_range(0..bodies.len()));
            bodies.swap(one, two);
        }),
        13 => in_bodies(sections, |bodies| {
            let body = random.random_range(0..bodies.len());
            number(random, &mut bodies[body]);
        }),
        _ => in_bodies(sections, |bodies| {
            let body = random.random_range(0..bodies.len());
            instruct(random, &mut bodies[body]);
        }),
    }
}

/// Works on the section of this id, if it is there.
fn in_section(sections: &mut [Section], id: u8, work: impl FnOnce(&mut Vec<u8>)) {
    if let Some(section) = sections.iter_mut().find(|section| section.id == id) {
        work(&mut section.content);
    }
}

/// Works on the function bodies, without their lengths, which are made anew.
fn in_bodies(sections: &mut [Section], work: impl FnOnce(&mut Vec<Vec<u8>>)) {
    in_section(sections, CODE, |content| {
        let Some(mut bodies) = bodies(content).filter(|bodies| !bodies.is_empty()) else { return };
        work(&mut bodies);
        *content = leb(bodies.len() as u32);
        for body in bodies {
            content.extend(leb(body.len() as u32));
            content.extend(body);
        }
    });
}

/// None: an earlier change has made them unreadable.
fn bodies(content: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut at = 0;
    let count = read(content, &mut at)?;
    let mut bodies = Vec::new();
    for _ in 0..count {
        let len = read(content, &mut at)? as usize;
        bodies.push(content.get(at..)?.get(..len)?.to_vec());
        at += len;
    }
    Some(bodies)
}

/// Another instruction somewhere in a body, in front of what is there or over it.
fn instruct(random: &mut StdRng, body: &mut Vec<u8>) {
    let instruction = INSTRUCTIONS.choose(random).expect("there are some");
    let at = random.random_range(0..=body.len());
    let over = if random.random_bool(0.5) { instruction.len().min(body.len() - at) } else { 0 };
    drop(body.splice(at..at + over, instruction.iter().copied()));
}

/// A section of another sample.
fn donate(random: &mut StdRng, sections: &mut Vec<Section>, samples: &[Vec<u8>]) {
    let donors: Vec<&Vec<u8>> = samples.iter().filter(|sample| sample.starts_with(HEAD)).collect();
    let Some(donor) = donors.choose(random) else { return };
    let Some(gift) = self::sections(donor).choose(random).cloned() else { return };
    match sections.iter().position(|section| section.id == gift.id) {
        Some(place) => sections[place] = gift,
        None => sections.push(gift),
    }
}

/// A custom section: a manifest that is none, or one too many.
fn custom(random: &mut StdRng, sections: &mut Vec<Section>, at: usize) {
    let lines: [&[u8]; 5] = [
        b"{\"plugin\":{\"abi\":1}}\n",
        b"{\"plugin\":{\"abi\":4294967296}}\n",
        b"{\"param\":{\"name\":\"\",\"type\":\"int\"}}\n",
        b"{\"column\":{\"name\":\"gate\",\"type\":\"any\"}}\n{\"column\":{\"name\":\"gate\",\"type\":\"any\"}}\n",
        b"[[[[[[[[[[[[[[[[[[[[\xff",
    ];
    let mut content = leb(8);
    content.extend(b"tidegate");
    content.extend(*lines.choose(random).expect("there are some"));
    sections.insert(at, Section { id: CUSTOM, content });
}

/// A number that means something to somebody, in place of whatever is there.
fn number(random: &mut StdRng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = random.random_range(0..bytes.len());
    // Of what is there, one number: up to the first byte that ends one.
    let end = bytes[at..].iter().position(|byte| byte & 0x80 == 0).map_or(bytes.len(), |len| at + len + 1);
    let mut number = leb(*NUMBERS.choose(random).expect("there are some"));
    if random.random_bool(0.1) {
        // Longer than it has to be, or than it may.
        let last = number.pop().expect("it has a byte");
        number.extend([last | 0x80, 0x80, 0x80, 0x80, 0x00]);
    }
    drop(bytes.splice(at..end, number));
}

fn replace_any(random: &mut StdRng, bytes: &mut [u8], with: &[u8]) {
    if let (false, Some(byte)) = (bytes.is_empty(), with.choose(random)) {
        bytes[random.random_range(0..bytes.len())] = *byte;
    }
}

/// Bits flipped, bytes cut off or put in: what a disk or a network does.
fn damage(random: &mut StdRng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = random.random_range(0..bytes.len());
    match random.random_range(0..8) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, random.random()),
        2 => {
            bytes.remove(at);
        }
        _ => bytes[at] ^= 1u8 << random.random_range(0..8u32),
    }
}

fn leb(mut value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// The number at `at`, which moves behind it.
fn read(bytes: &[u8], at: &mut usize) -> Option<u32> {
    let mut value = 0;
    for shift in (0..35).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return u32::try_from(value).ok();
        }
    }
    None
}

/// What is taken apart and put together unchanged is the same module, but for lengths that were longer than need be.
#[test]
fn sections_are_read_as_they_are_written() {
    let sections = self::sections(&tests::plugin("late.wasm"));
    let again = self::sections(&assemble(&sections));
    assert!(sections.len() > 5 && sections.len() == again.len());
    let mut code = again.clone();
    in_bodies(&mut code, |bodies| assert!(bodies.len() > 3, "{} functions", bodies.len()));
    for (one, two) in sections.iter().zip(&code) {
        assert_eq!(one.id, two.id);
        assert!(one.id == CODE || one.content == two.content);
    }
}
