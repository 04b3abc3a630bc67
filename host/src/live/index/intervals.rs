//! Ranges of byte strings, asked for those around a point: a treap by lower end in which every subtree knows its
//! greatest upper end. Coming, leaving and asking take the logarithm of how many there are (and asking what it finds).

const NIL: u32 = u32::MAX;

#[derive(Default)]
pub(super) struct Intervals {
    nodes: Vec<Node>,
    free: Vec<u32>,
    root: Root,
    /// State of the priorities' generator: any sequence that does not follow the keys will do.
    random: u64,
}

struct Root(u32);

impl Default for Root {
    fn default() -> Self {
        Root(NIL)
    }
}

struct Node {
    low: Box<[u8]>,
    /// `None`: without end.
    high: Option<Box<[u8]>>,
    id: u64,
    priority: u32,
    left: u32,
    right: u32,
    /// The node of this subtree whose range ends last.
    furthest: u32,
}

/// Whether the range that ends at `high` reaches `point`.
fn reaches(high: Option<&[u8]>, point: &[u8]) -> bool {
    high.is_none_or(|high| point <= high)
}

impl Intervals {
    pub(super) fn is_empty(&self) -> bool {
        self.root.0 == NIL
    }

    pub(super) fn insert(&mut self, low: Box<[u8]>, high: Option<Box<[u8]>>, id: u64) {
        let priority = self.priority();
        let node = Node { low, high, id, priority, left: NIL, right: NIL, furthest: NIL };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        };
        self.update(at);
        let (before, after) = self.split(self.root.0, at);
        let before = self.join(before, at);
        self.root = Root(self.join(before, after));
    }

    /// Takes the range of this group away; where it has none such, nothing happens.
    pub(super) fn remove(&mut self, low: &[u8], high: Option<&[u8]>, id: u64) {
        self.root = Root(self.without(self.root.0, low, high, id));
    }

    /// The groups whose ranges are around `point`.
    pub(super) fn around(&self, point: &[u8], found: &mut Vec<u64>) {
        self.visit(self.root.0, point, found);
    }

    pub(super) fn all(&self, found: &mut Vec<u64>) {
        let mut waiting = vec![self.root.0];
        while let Some(at) = waiting.pop() {
            if at != NIL {
                let node = self.node(at);
                found.push(node.id);
                waiting.extend([node.left, node.right]);
            }
        }
    }

    fn visit(&self, at: u32, point: &[u8], found: &mut Vec<u64>) {
        if at == NIL || !reaches(self.node(self.node(at).furthest).high.as_deref(), point) {
            return;
        }
        let node = self.node(at);
        self.visit(node.left, point, found);
        // From here on everything starts behind the point.
        if *node.low > *point {
            return;
        }
        if reaches(node.high.as_deref(), point) {
            found.push(node.id);
        }
        self.visit(node.right, point, found);
    }

    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn key(&self, at: u32) -> (&[u8], Option<&[u8]>, u64) {
        let node = self.node(at);
        (&node.low, node.high.as_deref(), node.id)
    }

    /// Nodes before `pivot` and the others.
    fn split(&mut self, at: u32, pivot: u32) -> (u32, u32) {
        if at == NIL {
            return (NIL, NIL);
        }
        if self.key(at) < self.key(pivot) {
            let (middle, after) = self.split(self.node(at).right, pivot);
            self.nodes[at as usize].right = middle;
            self.update(at);
            (at, after)
        } else {
            let (before, middle) = self.split(self.node(at).left, pivot);
            self.nodes[at as usize].left = middle;
            self.update(at);
            (before, at)
        }
    }

    /// Two trees, all of the first before all of the second.
    fn join(&mut self, before: u32, after: u32) -> u32 {
        if before == NIL || after == NIL {
            return if before == NIL { after } else { before };
        }
        if self.node(before).priority > self.node(after).priority {
            let right = self.join(self.node(before).right, after);
            self.nodes[before as usize].right = right;
            self.update(before);
            before
        } else {
            let left = self.join(before, self.node(after).left);
            self.nodes[after as usize].left = left;
            self.update(after);
            after
        }
    }

    fn without(&mut self, at: u32, low: &[u8], high: Option<&[u8]>, id: u64) -> u32 {
        if at == NIL {
            return NIL;
        }
        let (left, right) = (self.node(at).left, self.node(at).right);
        match (low, high, id).cmp(&self.key(at)) {
            std::cmp::Ordering::Equal => {
                let joined = self.join(left, right);
                let node = &mut self.nodes[at as usize];
                (node.low, node.high) = (Box::default(), None);
                self.free.push(at);
                return joined;
            }
            std::cmp::Ordering::Less => self.nodes[at as usize].left = self.without(left, low, high, id),
            std::cmp::Ordering::Greater => self.nodes[at as usize].right = self.without(right, low, high, id),
        }
        self.update(at);
        at
    }

    /// After a change below: which range of the subtree ends last.
    fn update(&mut self, at: u32) {
        let mut furthest = at;
        for child in [self.node(at).left, self.node(at).right] {
            if child != NIL {
                let other = self.node(child).furthest;
                let (one, two) = (self.node(furthest).high.as_deref(), self.node(other).high.as_deref());
                if one.is_some_and(|one| reaches(two, one) && two != Some(one)) {
                    furthest = other;
                }
            }
        }
        self.nodes[at as usize].furthest = furthest;
    }

    /// splitmix64.
    fn priority(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ bits >> 31) as u32
    }
}
