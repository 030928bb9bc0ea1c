//! Leads every change of what a server has through the steps of the module's
//! page, and settles at a start what a crash interrupted.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::attached::{Attached, Mark};
use super::files::{self, FileIdentity, Files};
use super::folder::StateFolder;
use super::place;
use super::record::{Intent, IntentFile, IntentList, State, StorePath};
use super::seal::{self, SealError};

const ATTACHED: &str = "attached";
const STATE: &str = "state";
const INTENT: &str = "intent";

/// A record that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another server has the state folder.
    #[error(
        "{}: another server has this state folder: stop that one first, or use another",
        .0.display()
    )]
    Locked(PathBuf),
    /// The operating system refused.
    #[error("{path}: {doing}: {error}", path = path.display())]
    System {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The answer.
        error: io::Error,
    },
    /// It is not what it should be.
    #[error("{path}: {error}; nothing was changed{advice}", path = path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: SealError,
        /// What can be done.
        advice: &'static str,
    },
}

fn system(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> StateError {
    move |error| StateError::System {
        path: path.to_owned(),
        doing,
        error,
    }
}

/// How a disk's list is found: [`place::list_of`], or what a test says.
pub type Locate = fn(&Path, Option<&Path>) -> io::Result<PathBuf>;

/// The records of one server.
#[derive(Debug)]
pub struct Keeper<F> {
    files: F,
    /// The folder of `--state`.
    folder: Option<PathBuf>,
    /// Its lock.
    _lock: Option<StateFolder>,
    locate: Locate,
    state: State,
    /// The list that was read last: a thousand volumes may have one disk.
    last_list: RefCell<Option<(PathBuf, FileIdentity, Arc<Attached>)>>,
}

/// A change under way, between [`Keeper::begin`] and [`Keeper::finish`] or
/// [`Keeper::abandon`].
#[derive(Debug)]
#[must_use = "a change is finished or abandoned"]
pub struct Change {
    old: State,
    next: State,
    intent: Intent,
    /// Whether the state may have been replaced.
    tried: bool,
}

impl Change {
    /// The name under which the file that belongs at `path` is to be made, with
    /// the identity that it keeps when it is renamed.
    pub fn made_as(&self, path: &Path) -> Option<PathBuf> {
        let mut files = self.intent.files.iter();
        files
            .find(|file| file.path.as_os_str() == path.as_os_str())?
            .made_as()
    }
}

impl<F: Files> Keeper<F> {
    /// Read what there is, and settle what a crash interrupted. Without a folder
    /// only lists are kept.
    pub fn open(files: F, folder: Option<StateFolder>) -> Result<Self, StateError> {
        let path = folder.as_ref().map(|folder| folder.path.clone());
        let keeper = Self::open_with(files, path, place::list_of)?;
        Ok(Self {
            _lock: folder,
            ..keeper
        })
    }

    /// Whether there is a state folder.
    pub fn has_folder(&self) -> bool {
        self.folder.is_some()
    }

    pub(super) fn open_with(
        files: F,
        folder: Option<PathBuf>,
        locate: Locate,
    ) -> Result<Self, StateError> {
        let mut keeper = Self {
            files,
            folder,
            _lock: None,
            locate,
            state: State::default(),
            last_list: RefCell::new(None),
        };
        if let Some(folder) = keeper.folder.clone() {
            let advice = "; move it away to begin without what it knew";
            let state = keeper.read(&folder.join(STATE), STATE, advice)?;
            keeper.state = state.unwrap_or_default();
            let advice = "; move it away once you have looked at what it names";
            if let Some(intent) = keeper.read(&folder.join(INTENT), INTENT, advice)? {
                keeper.settle(&intent)?;
            }
        }
        Ok(keeper)
    }

    /// What the server has, as far as it is recorded.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The list of a disk that exists; an empty one if there is none.
    pub fn list(&self, disk: &Path) -> Result<Arc<Attached>, StateError> {
        let path = self.list_path(disk)?;
        let beside = place::beside_it(disk, &path).map_err(system(disk, "looking at it"));
        let list = self.read_list(&path)?;
        match beside {
            Ok(Some(beside)) => Ok(Arc::new(list.with(&*self.read_list(&beside)?))),
            _ => Ok(list),
        }
    }

    /// Where that list is or would be.
    pub fn list_path(&self, disk: &Path) -> Result<PathBuf, StateError> {
        (self.locate)(disk, self.folder.as_deref())
            .map_err(system(disk, "finding the list of its stores"))
    }

    /// Begin the change to `next`. `files` are those that it makes (their
    /// identity is told by [`Keeper::made`]) or gives up. Afterwards files may be
    /// made; no store may miss a write yet that did not miss it before.
    pub fn begin(&mut self, next: State, files: Vec<IntentFile>) -> Result<Change, StateError> {
        // A volume that leaves the server leaves its disk's list as it is: the
        // stores still belong to the disk.
        let mut lists = Vec::new();
        let before = self.state.lists();
        let nothing = Attached::default();
        for (&disk, list) in &next.lists() {
            if before.get(disk) == Some(list) {
                continue;
            }
            let is_shared = self.state.shares(disk) || next.shares(disk);
            let about = is_shared.then(|| {
                let before = before.get(disk).unwrap_or(&nothing);
                self.state.changed_stores(&next, disk, before, list)
            });
            if about.as_ref().is_none_or(|stores| !stores.is_empty()) {
                lists.push(IntentList {
                    disk: disk.to_owned(),
                    list: self.list_path(disk)?,
                    about,
                });
            }
        }
        let change = Change {
            old: self.state.clone(),
            next,
            intent: Intent { lists, files },
            tried: false,
        };
        self.write_intent(&change.intent)?;
        if let Err(error) = self.join_lists(&change) {
            // The first error is the one to tell of.
            let _ = self.abandon(change);
            return Err(error);
        }
        Ok(change)
    }

    /// The files that belong at `paths` were made under their first names
    /// ([`Change::made_as`]): from here on a crash takes them away again wherever they
    /// are, and they may be given their own names.
    pub fn made(&mut self, change: &mut Change, paths: &[PathBuf]) -> Result<(), StateError> {
        let paths: BTreeSet<&OsStr> = paths.iter().map(|path| path.as_os_str()).collect();
        for file in &mut change.intent.files {
            if paths.contains(file.path.as_os_str())
                && let Some(made_as) = file.made_as()
            {
                file.identity = self
                    .files
                    .identify(&made_as)
                    .map_err(system(&made_as, "looking at it"))?;
            }
        }
        self.write_intent(&change.intent)
    }

    /// The state takes effect. When this returns, stores that have left their
    /// lists may miss writes, those that joined must not. If it fails the change
    /// is to be abandoned.
    pub fn commit(&mut self, change: &mut Change) -> Result<(), StateError> {
        change.tried = true;
        self.write_state(&change.next)?;
        self.state = change.next.clone();
        self.settle_lists(&change.intent)
    }

    /// Everything that follows from the commit has happened: delete what was
    /// given up, and forget the intent.
    pub fn finish(&mut self, change: Change) -> Result<(), StateError> {
        let Change { intent, .. } = change;
        self.delete_files(&intent)?;
        self.forget_intent()
    }

    /// Back to how it was before: lists, state, and files that were made.
    pub fn abandon(&mut self, change: Change) -> Result<(), StateError> {
        if change.tried {
            self.write_state(&change.old)?;
        }
        self.state = change.old;
        self.settle_lists(&change.intent)?;
        self.delete_files(&change.intent)?;
        self.forget_intent()
    }

    /// Mark a store of `disk` as one that has missed a write (durability.md, rule 6).
    pub fn mark_lost(&mut self, disk: &Path, cow: &Path) -> Result<(), StateError> {
        let path = self.list_path(disk)?;
        let _held = self.files.hold(files::folder_of(&path));
        let mut list = Attached::clone(&*self.list(disk)?);
        for store in &mut list.stores {
            if store.cow == cow {
                store.mark = Mark::Lost;
            }
        }
        self.write_list(&path, &list)
    }

    fn settle(&mut self, intent: &Intent) -> Result<(), StateError> {
        self.settle_lists(intent)?;
        self.delete_files(intent)?;
        self.forget_intent()
    }

    /// Every list names what it named and what it will name.
    fn join_lists(&mut self, change: &Change) -> Result<(), StateError> {
        let wanted = change.next.lists();
        for IntentList { disk, list, about } in &change.intent.lists {
            let _held = self.hold_shared(list, about.as_ref());
            let now = self.read_list(list)?;
            let both = match (wanted.get(disk.as_path()), about) {
                (Some(wanted), None) => now.with(wanted),
                (Some(wanted), Some(about)) => now.with(&wanted.only(about)),
                (None, _) => Attached::clone(&now),
            };
            self.write_list(list, &both)?;
        }
        Ok(())
    }

    /// Every list says what the state says; a store that is lost stays lost.
    fn settle_lists(&mut self, intent: &Intent) -> Result<(), StateError> {
        let lists = self.state.lists();
        let wanted: Vec<Attached> = intent
            .lists
            .iter()
            .map(|one| lists.get(one.disk.as_path()).cloned().unwrap_or_default())
            .collect();
        for (IntentList { list, about, .. }, mut wanted) in intent.lists.iter().zip(wanted) {
            let _held = self.hold_shared(list, about.as_ref());
            let now = self.read_list(list)?;
            if let Some(about) = about {
                wanted = now.without(about).with(&wanted.only(about));
            }
            let known = now.by_cow();
            for store in &mut wanted.stores {
                let now = known.get(store.cow.as_os_str());
                if now.is_some_and(|now| now.mark == Mark::Lost) {
                    store.mark = Mark::Lost;
                }
            }
            self.write_list(list, &wanted)?;
        }
        Ok(())
    }

    /// Keep other servers from a list while it is read and written anew, if they may
    /// have it too.
    fn hold_shared(&self, list: &Path, about: Option<&Vec<StorePath>>) -> Option<File> {
        about.and_then(|_| self.files.hold(files::folder_of(list)))
    }

    /// Delete the files of an intent that no snapshot of the state names, as far
    /// as they are the ones that were meant.
    fn delete_files(&mut self, intent: &Intent) -> Result<(), StateError> {
        let named = self.state.cows();
        let named: Vec<bool> = intent
            .files
            .iter()
            .map(|file| named.contains(file.path.as_os_str()))
            .collect();
        for (file, is_named) in intent.files.iter().zip(named) {
            if let Some(made_as) = file.made_as()
                && self.identify(&made_as)?.is_some()
            {
                self.delete(&made_as)?;
            }
            if !is_named && file.identity.is_some() && self.identify(&file.path)? == file.identity {
                self.delete(&file.path)?;
            }
        }
        Ok(())
    }

    fn identify(&self, path: &Path) -> Result<Option<FileIdentity>, StateError> {
        let identity = self.files.identify(path);
        identity.map_err(system(path, "looking at it"))
    }

    fn delete(&mut self, path: &Path) -> Result<(), StateError> {
        files::remove(&mut self.files, path).map_err(system(path, "deleting it"))
    }

    fn read<T: serde::de::DeserializeOwned>(
        &self,
        path: &Path,
        what: &'static str,
        advice: &'static str,
    ) -> Result<Option<T>, StateError> {
        let bytes = self.files.read(path).map_err(system(path, "reading it"))?;
        let record = bytes.map(|bytes| seal::decode(what, &bytes)).transpose();
        record.map_err(|error| StateError::Record {
            path: path.to_owned(),
            error,
            advice,
        })
    }

    /// Read a list, unless it is the same file as the last time.
    fn read_list(&self, path: &Path) -> Result<Arc<Attached>, StateError> {
        // Where the file system does not say when a file was made, its number may mean
        // another one by now.
        let file = self.identify(path)?.filter(|file| file.born != 0);
        if let (Some(file), Some((last, known, list))) = (file, &*self.last_list.borrow())
            && *known == file
            && last == path
        {
            return Ok(Arc::clone(list));
        }
        let advice = "; if you are sure of the disk's stores, move it away";
        let list: Option<Attached> = self.read(path, ATTACHED, advice)?;
        let list = Arc::new(list.unwrap_or_default());
        let last = file.map(|file| (path.to_owned(), file, Arc::clone(&list)));
        *self.last_list.borrow_mut() = last;
        Ok(list)
    }

    /// An empty list is no file.
    fn write_list(&mut self, path: &Path, list: &Attached) -> Result<(), StateError> {
        if *self.read_list(path)? == *list {
            return Ok(());
        }
        *self.last_list.borrow_mut() = None;
        if list.stores.is_empty() {
            return files::remove(&mut self.files, path).map_err(system(path, "deleting it"));
        }
        let bytes = seal::encode(ATTACHED, list);
        files::replace(&mut self.files, path, &bytes).map_err(system(path, "writing it"))
    }

    fn write_state(&mut self, state: &State) -> Result<(), StateError> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let path = folder.join(STATE);
        let bytes = seal::encode(STATE, state);
        files::replace(&mut self.files, &path, &bytes).map_err(system(&path, "writing it"))
    }

    fn write_intent(&mut self, intent: &Intent) -> Result<(), StateError> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let path = folder.join(INTENT);
        let bytes = seal::encode(INTENT, intent);
        files::replace(&mut self.files, &path, &bytes).map_err(system(&path, "writing it"))
    }

    fn forget_intent(&mut self) -> Result<(), StateError> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let path = folder.join(INTENT);
        files::remove(&mut self.files, &path).map_err(system(&path, "deleting it"))
    }
}
