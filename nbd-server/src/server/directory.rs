//! The exports of the moment, and where each leads. Whoever meets a client takes
//! a look, which never changes; the administrator publishes the next one.

use std::sync::{Arc, Mutex};

use nbdsnap_engine::View;

use crate::io::VolumeId;
use crate::nbd::export::Catalog;

/// Where an export leads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub(super) shard: usize,
    pub(super) volume: VolumeId,
    pub(super) view: View,
    /// Writes are refused.
    pub(super) read_only: bool,
}

/// The exports of one moment.
#[derive(Debug, Default)]
pub(super) struct Exports {
    pub(super) catalog: Arc<Catalog>,
    /// Index by index.
    routes: Vec<Route>,
}

impl Exports {
    pub(super) fn new(catalog: Catalog, routes: Vec<Route>) -> Self {
        assert_eq!(
            catalog.exports().len(),
            routes.len(),
            "every export leads somewhere"
        );
        Self {
            catalog: Arc::new(catalog),
            routes,
        }
    }

    /// Where the export `index` of the catalog leads.
    pub(super) fn route(&self, index: usize) -> Route {
        self.routes[index]
    }
}

/// The latest [`Exports`].
#[derive(Debug, Default)]
pub(super) struct Directory {
    now: Mutex<Arc<Exports>>,
}

impl Directory {
    pub(super) fn look(&self) -> Arc<Exports> {
        Arc::clone(&self.now.lock().expect("no holder of this lock panics"))
    }

    pub(super) fn publish(&self, exports: Exports) {
        *self.now.lock().expect("no holder of this lock panics") = Arc::new(exports);
    }
}
