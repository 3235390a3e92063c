//! Sets of guest page frames.

use std::collections::BTreeMap;
use std::fmt;

/// Pages a chunk of the set stands for: 2^15, 128 MiB of guest memory in 4 KiB of bitmap.
const CHUNK_PAGES: u64 = 1 << 15;
const CHUNK_WORDS: usize = (CHUNK_PAGES / 64) as usize;

/// A set of guest page frame numbers (GFN: a guest physical address divided by 4096).
///
/// Holds a bit a page for every 128 MiB in which there is any, so that holes cost nothing: 1/32768 of the guest memory it is used for,
/// and at most 4 KiB a frame wherever that is. It takes any frame: of a foreign list, those that are not
/// [RAM](crate::GuestRam::contains) are sorted out first.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    /// By GFN / `CHUNK_PAGES`. No chunk is empty.
    chunks: BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>,
}

impl PageSet {
    /// An empty set.
    pub fn new() -> Self {
        PageSet::default()
    }

    /// Adds a frame. Returns whether it is new.
    pub fn insert(&mut self, gfn: u64) -> bool {
        let word = &mut self.chunk(gfn / CHUNK_PAGES)[word_of(gfn)];
        let new = *word & bit_of(gfn) == 0;
        *word |= bit_of(gfn);
        new
    }

    /// Adds the frames whose bits are set: bit 0 of the first word is frame `first_gfn`, as in KVM's dirty bitmaps.
    ///
    /// Bits that would stand for frames past 2^64 are ignored.
    pub fn insert_words(&mut self, first_gfn: u64, words: &[u64]) {
        let shift = first_gfn % 64;
        for (index, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            let Some(gfn) = (index as u64 * 64).checked_add(first_gfn - shift) else { return };
            self.merge_word(gfn, word << shift);
            if shift > 0
                && word >> (64 - shift) != 0
                && let Some(next) = gfn.checked_add(64)
            {
                self.merge_word(next, word >> (64 - shift));
            }
        }
    }

    /// Adds `count` frames from `first` on, as many of them as there are below 2^64 - 1.
    pub fn insert_range(&mut self, first: u64, count: u64) {
        let mut gfn = first;
        let mut left = count.min(u64::MAX - first);
        while left > 0 {
            let now = left.min(CHUNK_PAGES - gfn % CHUNK_PAGES);
            let chunk = self.chunk(gfn / CHUNK_PAGES);
            let end = gfn + now;
            while gfn < end {
                let bits = (end - gfn).min(64 - gfn % 64);
                chunk[word_of(gfn)] |= (u64::MAX >> (64 - bits)) << (gfn % 64);
                gfn += bits;
            }
            left -= now;
        }
    }

    /// Takes a frame out. Returns whether it was in.
    pub fn remove(&mut self, gfn: u64) -> bool {
        let Some(chunk) = self.chunks.get_mut(&(gfn / CHUNK_PAGES)) else { return false };
        let word = &mut chunk[word_of(gfn)];
        let was_in = *word & bit_of(gfn) != 0;
        *word &= !bit_of(gfn);
        if was_in && chunk.iter().all(|word| *word == 0) {
            self.chunks.remove(&(gfn / CHUNK_PAGES));
        }
        was_in
    }

    /// Whether a frame is in.
    pub fn contains(&self, gfn: u64) -> bool {
        self.chunks
            .get(&(gfn / CHUNK_PAGES))
            .is_some_and(|chunk| chunk[word_of(gfn)] & bit_of(gfn) != 0)
    }

    /// Adds all frames of another set.
    pub fn union(&mut self, other: &PageSet) {
        for (number, words) in &other.chunks {
            let chunk = self.chunk(*number);
            chunk.iter_mut().zip(words.iter()).for_each(|(mine, theirs)| *mine |= theirs);
        }
    }

    /// The number of frames.
    pub fn len(&self) -> u64 {
        self.chunks
            .values()
            .flat_map(|chunk| chunk.iter())
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Takes all frames out.
    pub fn clear(&mut self) {
        self.chunks.clear();
    }

    /// The frames in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words().flat_map(|(first, word)| frames_of(first, word))
    }

    /// Takes all frames out, in ascending order. Those the iterator is not asked for are gone as well.
    pub fn drain(&mut self) -> impl Iterator<Item = u64> + use<> {
        std::mem::take(&mut self.chunks).into_iter().flat_map(|(number, words)| {
            (0..CHUNK_PAGES)
                .step_by(64)
                .flat_map(move |gfn| frames_of(number * CHUNK_PAGES + gfn, words[word_of(gfn)]))
        })
    }

    /// Runs of neighbouring frames in ascending order, as first frame and count; each as long as can be.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut parts = self.words().flat_map(|(first, word)| runs_of(first, word)).peekable();
        std::iter::from_fn(move || {
            let (first, mut count) = parts.next()?;
            while let Some((_, more)) = parts.next_if(|part| part.0 == first.wrapping_add(count)) {
                count += more;
            }
            Some((first, count))
        })
    }

    /// Words that are not empty, with the frame of their bit 0.
    fn words(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().flat_map(|(number, words)| {
            let numbered = words.iter().enumerate().filter(|(_, word)| **word != 0);
            numbered.map(move |(index, word)| (number * CHUNK_PAGES + index as u64 * 64, *word))
        })
    }

    fn chunk(&mut self, number: u64) -> &mut [u64; CHUNK_WORDS] {
        self.chunks.entry(number).or_insert_with(|| Box::new([0; CHUNK_WORDS]))
    }

    /// Adds a word that is not empty; `gfn` is a multiple of 64.
    fn merge_word(&mut self, gfn: u64, word: u64) {
        if word != 0 {
            self.chunk(gfn / CHUNK_PAGES)[word_of(gfn)] |= word;
        }
    }
}

/// The frames of a word's bits.
fn frames_of(first: u64, mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        // Nothing left if there is no lowest bit to take off.
        word &= word.checked_sub(1)?;
        Some(first + u64::from(bit))
    })
}

/// The runs of a word's bits, as first frame and count.
fn runs_of(first: u64, mut word: u64) -> impl Iterator<Item = (u64, u64)> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        let count = word.checked_shr(bit)?.trailing_ones();
        word &= u64::MAX.checked_shl(bit + count).unwrap_or(0);
        Some((first + u64::from(bit), u64::from(count)))
    })
}

fn word_of(gfn: u64) -> usize {
    (gfn % CHUNK_PAGES / 64) as usize
}

fn bit_of(gfn: u64) -> u64 {
    1 << (gfn % 64)
}

impl Extend<u64> for PageSet {
    fn extend<I: IntoIterator<Item = u64>>(&mut self, frames: I) {
        frames.into_iter().for_each(|gfn| {
            self.insert(gfn);
        });
    }
}

impl FromIterator<u64> for PageSet {
    fn from_iter<I: IntoIterator<Item = u64>>(frames: I) -> Self {
        let mut set = PageSet::new();
        set.extend(frames);
        set
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        write!(f, "PageSet({} pages:", self.len())?;
        for (first, count) in self.runs().take(SHOWN) {
            write!(f, " {first:#x}+{count}")?;
        }
        f.write_str(if self.runs().nth(SHOWN).is_some() { " …)" } else { ")" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64),
        Remove(u64),
        Words(u64, Vec<u64>),
        Range(u64, u64),
        Union(Vec<u64>),
    }

    /// Frames around the places where something could go wrong: word and chunk ends, and the end of it all.
    fn gfn() -> impl Strategy<Value = u64> {
        prop_oneof![0..200u64, CHUNK_PAGES - 70..CHUNK_PAGES + 70, (u64::MAX - 200)..u64::MAX]
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            gfn().prop_map(Op::Insert),
            gfn().prop_map(Op::Remove),
            (gfn(), proptest::collection::vec(prop_oneof![Just(0), any::<u64>()], 0..4))
                .prop_map(|(g, w)| Op::Words(g, w)),
            (gfn(), 0..300u64).prop_map(|(g, n)| Op::Range(g, n)),
            proptest::collection::vec(gfn(), 0..5).prop_map(Op::Union),
        ]
    }

    proptest! {
        #[test]
        fn as_an_ordered_set(ops in proptest::collection::vec(op(), 0..40)) {
            let mut set = PageSet::new();
            let mut oracle = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(gfn) => prop_assert_eq!(set.insert(gfn), oracle.insert(gfn)),
                    Op::Remove(gfn) => prop_assert_eq!(set.remove(gfn), oracle.remove(&gfn)),
                    Op::Words(first, words) => {
                        set.insert_words(first, &words);
                        for (index, word) in words.iter().enumerate() {
                            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                                oracle.extend(first.checked_add(index as u64 * 64 + bit));
                            }
                        }
                    }
                    Op::Range(first, count) => {
                        set.insert_range(first, count);
                        oracle.extend((0..count).map_while(|n| first.checked_add(n).filter(|gfn| *gfn < u64::MAX)));
                    }
                    Op::Union(frames) => {
                        set.union(&frames.iter().copied().collect());
                        oracle.extend(frames);
                    }
                }
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), oracle.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), oracle.len() as u64);
            prop_assert_eq!(set.is_empty(), oracle.is_empty());
            prop_assert!(oracle.iter().all(|gfn| set.contains(*gfn)));
            let from_runs: Vec<_> = set.runs().flat_map(|(first, count)| (0..count).map(move |n| first + n)).collect();
            prop_assert!(set.runs().zip(set.runs().skip(1)).all(|(a, b)| a.0 + a.1 < b.0));
            prop_assert_eq!(set.drain().collect::<Vec<_>>(), from_runs.clone());
            prop_assert!(set.is_empty() && set == PageSet::new());
            prop_assert_eq!(from_runs, oracle.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn debug_is_short() {
        let set: PageSet = (0..1000).map(|n| n * 2).collect();
        assert_eq!(
            format!("{set:?}"),
            "PageSet(1000 pages: 0x0+1 0x2+1 0x4+1 0x6+1 0x8+1 0xa+1 0xc+1 0xe+1 …)"
        );
    }
}
