//! What runs met, counted: one ledger for the three simulators, each with a list of its
//! own of what is to be met. A search that never tears an area or never fills a store
//! cannot pass for one that did.

/// A list of what is counted, made by `tallies!`.
pub trait Tallied: Copy + 'static {
    /// All of them with their words, each at the place of its number.
    const ALL: &'static [(Self, &'static str)];

    /// Its place in the list.
    fn number(self) -> usize;
}

/// The counts.
#[derive(Clone, Debug)]
pub struct Ledger<T> {
    counts: Vec<u64>,
    of: std::marker::PhantomData<T>,
}

impl<T: Tallied> Default for Ledger<T> {
    fn default() -> Self {
        Self {
            counts: vec![0; T::ALL.len()],
            of: std::marker::PhantomData,
        }
    }
}

impl<T: Tallied> Ledger<T> {
    /// One more.
    pub fn count(&mut self, tally: T) {
        self.counts[tally.number()] += 1;
    }

    /// All that another ledger has.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// What was never met.
    pub fn never(&self) -> Vec<&'static str> {
        let unmet = T::ALL
            .iter()
            .filter(|(tally, _)| self.counts[tally.number()] == 0);
        unmet.map(|(_, text)| *text).collect()
    }
}

impl<T: Tallied> std::fmt::Display for Ledger<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (tally, text) in T::ALL {
            writeln!(f, "{:>12}  {text}", self.counts[tally.number()])?;
        }
        Ok(())
    }
}

/// `Tally`, an enum of what is counted, and the `Ledger` of it.
macro_rules! tallies {
    ($($name:ident $text:literal,)*) => {
        /// Something that is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Tally {
            $(
                #[doc = $text]
                $name,
            )*
        }

        impl $crate::simulator::tallies::Tallied for Tally {
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$name, $text),)*];

            fn number(self) -> usize {
                self as usize
            }
        }

        /// The counts.
        pub type Ledger = $crate::simulator::tallies::Ledger<Tally>;
    };
}

pub(super) use tallies;
