//! Under which law of durability this process makes its volumes and stores: all
//! of them, here and nowhere else.
//!
//! In a build of the program it is the engine's own, and these functions are the
//! engine's. With the cargo feature `mutants` (never in a build that anybody
//! serves disks with) the variable `NBDSNAP_MUTANT` names a rule to break, so that
//! the suites which cut power can show that they notice.

use nbdsnap_engine::{
    Access, DiskError, OpenError, Store, StoreIo, StoreKind, StoreSize, StoreSpec, Volume,
    VolumeConfig,
};

/// [`Volume::new`].
pub(crate) fn new_volume(config: VolumeConfig) -> Volume {
    #[allow(unused_mut)]
    let mut volume = Volume::new(config);
    #[cfg(feature = "mutants")]
    volume.set_law(broken::law());
    volume
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

#[cfg(feature = "mutants")]
pub(crate) use broken::announce;

#[cfg(feature = "mutants")]
mod broken {
    use std::sync::OnceLock;

    use nbdsnap_engine::law::{Law, Mutant};

    /// Names the rule to break.
    const VARIABLE: &str = "NBDSNAP_MUTANT";

    /// What the variable named when it was first asked for.
    fn mutant() -> Result<Mutant, String> {
        static MUTANT: OnceLock<Result<Mutant, String>> = OnceLock::new();
        MUTANT
            .get_or_init(|| match std::env::var(VARIABLE) {
                Err(std::env::VarError::NotPresent) => Ok(Mutant::None),
                Err(error) => Err(format!("{VARIABLE}: {error}")),
                Ok(name) => Mutant::named(&name)
                    .ok_or_else(|| format!("{VARIABLE}={name}: there is none of that name")),
            })
            .clone()
    }

    pub(super) fn law() -> Law {
        // The command line has refused a name that nobody knows.
        Law::broken(mutant().unwrap_or_default())
    }

    /// Say at the start what is broken, whatever is logged otherwise; refuse a
    /// name that nobody knows.
    pub(crate) fn announce() -> Result<(), String> {
        match mutant()? {
            Mutant::None => eprintln!("nbdsnap: built with mutants; no rule is broken"),
            broken => eprintln!(
                "nbdsnap: MUTANT {broken:?}: a rule of durability is broken on purpose: a power cut will lose data"
            ),
        }
        Ok(())
    }
}
