//! Ordered sets of slots, woven through the slots themselves: a treap, whose random priorities are a hash, so that
//! they cost no memory. Owns `left` and `right` of a slot; a slot is in one tree at most.
//!
//! All loops go down one path: O(log n) expected, as long as priorities have nothing to do with keys. Hence the hash
//! is of the message's id and a salt that nobody outside knows: not of the slot's index, for slots are freed in the
//! order of a tree that is emptied from its root and given out again in the order of ids; and not of the id alone,
//! which whoever may INSERT can choose. No recursion, no allocation.

use crate::policy::mix;
use crate::slot::Slot;
use crate::NIL;

/// What a tree is ordered by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Message id, ascending.
    Id,
    /// Deadline, then message id.
    Deadline,
}

#[derive(Clone, Copy)]
enum Link {
    Root,
    Left(u32),
    Right(u32),
}

fn priority(slots: &[Slot], salt: u32, index: u32) -> u32 {
    let msg_id = slots[index as usize].msg_id as u64;
    mix(msg_id ^ mix(u64::from(salt))) as u32
}

fn key(slots: &[Slot], index: u32, order: Order) -> (i64, i64) {
    let slot = &slots[index as usize];
    match order {
        Order::Id => (slot.msg_id, 0),
        Order::Deadline => (slot.deadline_us, slot.msg_id),
    }
}

fn get(slots: &[Slot], root: u32, link: Link) -> u32 {
    match link {
        Link::Root => root,
        Link::Left(i) => slots[i as usize].left,
        Link::Right(i) => slots[i as usize].right,
    }
}

fn set(slots: &mut [Slot], root: &mut u32, link: Link, to: u32) {
    match link {
        Link::Root => *root = to,
        Link::Left(i) => slots[i as usize].left = to,
        Link::Right(i) => slots[i as usize].right = to,
    }
}

/// Adds slot `new`, which is in no tree.
pub(crate) fn insert(slots: &mut [Slot], salt: u32, root: &mut u32, new: u32, order: Order) {
    let (new_key, new_priority) = (key(slots, new, order), priority(slots, salt, new));
    let mut link = Link::Root;
    let mut here = *root;
    while here != NIL && new_priority <= priority(slots, salt, here) {
        link = if new_key < key(slots, here, order) { Link::Left(here) } else { Link::Right(here) };
        here = get(slots, *root, link);
    }
    set(slots, root, link, new);
    // What hung here is split around the new key into the new slot's two subtrees.
    let (mut less, mut more) = (Link::Left(new), Link::Right(new));
    while here != NIL {
        if key(slots, here, order) < new_key {
            set(slots, root, less, here);
            less = Link::Right(here);
            here = slots[here as usize].right;
        } else {
            set(slots, root, more, here);
            more = Link::Left(here);
            here = slots[here as usize].left;
        }
    }
    set(slots, root, less, NIL);
    set(slots, root, more, NIL);
}

/// Takes slot `old` out. Its key must be what it was when it was inserted. True if it was there.
pub(crate) fn remove(slots: &mut [Slot], salt: u32, root: &mut u32, old: u32, order: Order) -> bool {
    let old_key = key(slots, old, order);
    let mut link = Link::Root;
    loop {
        let here = get(slots, *root, link);
        if here == NIL {
            return false;
        }
        if here == old {
            break;
        }
        link = if old_key < key(slots, here, order) { Link::Left(here) } else { Link::Right(here) };
    }
    let (mut a, mut b) = (slots[old as usize].left, slots[old as usize].right);
    loop {
        if a == NIL || b == NIL {
            set(slots, root, link, if a == NIL { b } else { a });
            break;
        }
        if priority(slots, salt, a) > priority(slots, salt, b) {
            set(slots, root, link, a);
            link = Link::Right(a);
            a = slots[a as usize].right;
        } else {
            set(slots, root, link, b);
            link = Link::Left(b);
            b = slots[b as usize].left;
        }
    }
    slots[old as usize].left = NIL;
    slots[old as usize].right = NIL;
    true
}

/// Whether slot `a` comes before slot `b`.
#[cfg(any(test, feature = "check"))]
pub(crate) fn is_less(slots: &[Slot], a: u32, b: u32, order: Order) -> bool {
    key(slots, a, order) < key(slots, b, order)
}

/// Whether slot `a` may be above slot `b` in a tree.
#[cfg(any(test, feature = "check"))]
pub(crate) fn is_above(slots: &[Slot], salt: u32, a: u32, b: u32) -> bool {
    priority(slots, salt, a) >= priority(slots, salt, b)
}

/// The slot with the lowest key, or NIL.
pub(crate) fn first(slots: &[Slot], root: u32) -> u32 {
    let mut here = root;
    while here != NIL && slots[here as usize].left != NIL {
        here = slots[here as usize].left;
    }
    here
}

/// The slot with the lowest id that is not below `from`, of a tree ordered by id, or NIL.
pub(crate) fn first_from(slots: &[Slot], root: u32, from: i64) -> u32 {
    let (mut here, mut found) = (root, NIL);
    while here != NIL {
        let slot = &slots[here as usize];
        if slot.msg_id >= from {
            found = here;
            here = slot.left;
        } else {
            here = slot.right;
        }
    }
    found
}

/// Takes the slot with the lowest key out; NIL if there is none.
pub(crate) fn pop_first(slots: &mut [Slot], root: &mut u32) -> u32 {
    if *root == NIL {
        return NIL;
    }
    let (mut above, mut first) = (NIL, *root);
    while slots[first as usize].left != NIL {
        above = first;
        first = slots[first as usize].left;
    }
    let link = if above == NIL { Link::Root } else { Link::Left(above) };
    let right = slots[first as usize].right;
    set(slots, root, link, right);
    slots[first as usize].right = NIL;
    first
}

/// The slot with the lowest key above this one, or NIL.
pub(crate) fn after(slots: &[Slot], root: u32, above: (i64, i64), order: Order) -> u32 {
    let (mut here, mut found) = (root, NIL);
    while here != NIL {
        if key(slots, here, order) > above {
            found = here;
            here = slots[here as usize].left;
        } else {
            here = slots[here as usize].right;
        }
    }
    found
}

/// The slot before slot `of` (which is in the tree), or NIL.
pub(crate) fn before(slots: &[Slot], root: u32, of: u32, order: Order) -> u32 {
    let of_key = key(slots, of, order);
    let (mut here, mut found) = (root, NIL);
    while here != NIL {
        if key(slots, here, order) < of_key {
            found = here;
            here = slots[here as usize].right;
        } else {
            here = slots[here as usize].left;
        }
    }
    found
}

/// The slot with the highest key, or NIL.
pub(crate) fn last(slots: &[Slot], root: u32) -> u32 {
    let mut here = root;
    while here != NIL && slots[here as usize].right != NIL {
        here = slots[here as usize].right;
    }
    here
}
