//! Under which law of durability this process makes its volumes and stores, and
//! by which rules it orders them: all of them, here and nowhere else.
//!
//! In a build of the program it is the engine's own, and these functions are the
//! engine's. With the cargo feature `mutants` (never in a build that anybody
//! serves disks with) the variable `NBDSNAP_MUTANT` names a rule to break, of the
//! engine's or of the server's own, so that the suites which try it can show that
//! they notice.

use nbdsnap_engine::dm::Mapper;
use nbdsnap_engine::{
    Access, DiskError, OpenError, Store, StoreIo, StoreKind, StoreSize, StoreSpec, Tree,
    VolumeConfig,
};

/// [`Tree::new`].
pub(crate) fn new_tree(config: VolumeConfig) -> Tree {
    #[allow(unused_mut)]
    let mut tree = Tree::new(config);
    #[cfg(feature = "mutants")]
    tree.set_law(broken::law());
    tree
}

/// [`Mapper::new`].
pub(crate) fn new_mapper(config: VolumeConfig) -> Mapper {
    #[allow(unused_mut)]
    let mut mapper = Mapper::new(config);
    #[cfg(feature = "mutants")]
    mapper.set_law(broken::law());
    mapper
}

/// [`Store::create`].
pub(crate) fn create_store(spec: StoreSpec, io: &mut dyn StoreIo) -> Result<Store, DiskError> {
    #[cfg(feature = "mutants")]
    return Store::create_under(broken::law(), spec, io);
    #[cfg(not(feature = "mutants"))]
    Store::create(spec, io)
}

/// [`Store::open`].
pub(crate) fn open_store(
    kind: StoreKind,
    size: StoreSize,
    origin_bytes: u64,
    access: Access,
    io: &mut dyn StoreIo,
) -> Result<Store, OpenError> {
    #[cfg(feature = "mutants")]
    return Store::open_under(broken::law(), kind, size, origin_bytes, access, io);
    #[cfg(not(feature = "mutants"))]
    Store::open(kind, size, origin_bytes, access, io)
}

/// The snapshots of a group are of one instant: all of its volumes are held before
/// the first of them goes on.
#[cfg(not(feature = "mutants"))]
pub(crate) const fn group_is_one_instant() -> bool {
    true
}

#[cfg(feature = "mutants")]
pub(crate) use broken::{announce, group_is_one_instant};

#[cfg(feature = "mutants")]
mod broken {
    use std::sync::OnceLock;

    use nbdsnap_engine::law::{Law, Mutant};

    /// Names the rule to break.
    const VARIABLE: &str = "NBDSNAP_MUTANT";

    /// A rule to break.
    #[derive(Clone, Copy, Debug)]
    enum Broken {
        /// Of the engine's.
        Law(Mutant),
        /// Of the server's: each volume of a group has an instant of its own.
        GroupOneByOne,
    }

    impl Broken {
        fn named(name: &str) -> Option<Self> {
            match name {
                "GroupOneByOne" => Some(Self::GroupOneByOne),
                name => Mutant::named(name).map(Self::Law),
            }
        }
    }

    /// What the variable named when it was first asked for.
    fn broken() -> Result<Broken, String> {
        static BROKEN: OnceLock<Result<Broken, String>> = OnceLock::new();
        BROKEN
            .get_or_init(|| match std::env::var(VARIABLE) {
                Err(std::env::VarError::NotPresent) => Ok(Broken::Law(Mutant::None)),
                Err(error) => Err(format!("{VARIABLE}: {error}")),
                Ok(name) => Broken::named(&name)
                    .ok_or_else(|| format!("{VARIABLE}={name}: there is none of that name")),
            })
            .clone()
    }

    // The command line has refused a name that nobody knows.

    pub(super) fn law() -> Law {
        match broken() {
            Ok(Broken::Law(mutant)) => Law::broken(mutant),
            _ => Law::default(),
        }
    }

    pub(crate) fn group_is_one_instant() -> bool {
        !matches!(broken(), Ok(Broken::GroupOneByOne))
    }

    /// Say at the start what is broken, whatever is logged otherwise; refuse a
    /// name that nobody knows.
    pub(crate) fn announce() -> Result<(), String> {
        match broken()? {
            Broken::Law(Mutant::None) => {
                eprintln!("nbdsnap: built with mutants; no rule is broken");
            }
            Broken::Law(mutant) => eprintln!(
                "nbdsnap: MUTANT {mutant:?}: a rule of durability is broken on purpose: a power cut will lose data"
            ),
            Broken::GroupOneByOne => eprintln!(
                "nbdsnap: MUTANT GroupOneByOne: a rule of groups is broken on purpose: their snapshots are not of one instant"
            ),
        }
        Ok(())
    }
}
