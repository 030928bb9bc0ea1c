//! Leads every change of what a server has through the steps of the module's
//! page, and settles at a start what a crash interrupted.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::attached::{Attached, Mark};
use super::files::{self, FileIdentity, Files};
use super::folder::StateFolder;
use super::place;
use super::record::{Intent, IntentFile, IntentList, State, StorePath, VolumeRecord};
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
    /// What the changes that are under way are about, by their numbers.
    under_way: BTreeMap<u64, Intent>,
    /// The number of the last change.
    last: u64,
}

/// A change under way, between [`Keeper::begin`] and [`Keeper::finish`] or
/// [`Keeper::abandon`]. Several may be, as long as they touch different volumes.
#[derive(Debug)]
#[must_use = "a change is finished or abandoned"]
pub struct Change {
    /// Its name among those that are under way.
    number: u64,
    /// The volumes that it touches.
    touched: Vec<Touched>,
    intent: Intent,
    /// Whether the state may have been replaced.
    tried: bool,
}

/// What a change does to a volume's record.
#[derive(Clone, Debug)]
struct Touched {
    name: String,
    old: Option<VolumeRecord>,
    next: Option<VolumeRecord>,
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
            under_way: BTreeMap::new(),
            last: 0,
        };
        if let Some(folder) = keeper.folder.clone() {
            let advice = "; move it away to begin without what it knew";
            let state: Option<State> = keeper.read(&folder.join(STATE), STATE, advice)?;
            keeper.state = state.unwrap_or_default();
            keeper.settle_anew()?;
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
        let list = self.list_as_written(disk, &self.list_path(disk)?)?;
        self.settled_list(list)
    }

    /// A disk's list, with one that lies beside the disk though this server's lies
    /// elsewhere.
    fn list_as_written(&self, disk: &Path, path: &Path) -> Result<Arc<Attached>, StateError> {
        let list = self.read_list(path)?;
        match place::beside_it(disk, path) {
            Ok(Some(beside)) => Ok(Arc::new(list.with(&*self.read_list(&beside)?))),
            Ok(None) | Err(_) => Ok(list),
        }
    }

    /// What a list means, if stores on it are about to be exchanged.
    fn settled_list(&self, list: Arc<Attached>) -> Result<Arc<Attached>, StateError> {
        if list.stores.iter().all(|store| store.anew.is_none()) {
            return Ok(list);
        }
        let mut list = Attached::clone(&list);
        for store in list.stores.iter_mut().filter(|one| one.anew.is_some()) {
            store.settle_anew(self.identify(&store.cow)?);
        }
        Ok(Arc::new(list))
    }

    /// A crash may have fallen before or after the step in which a store was
    /// exchanged for a new one.
    fn settle_anew(&mut self) -> Result<(), StateError> {
        let mut state = std::mem::take(&mut self.state);
        let snapshots = state.volumes.iter_mut().flat_map(|one| &mut one.snapshots);
        for snapshot in snapshots.filter(|one| one.anew.is_some()) {
            snapshot.settle_anew(self.identify(&snapshot.cow)?);
        }
        self.state = state;
        Ok(())
    }

    /// Where that list is or would be.
    pub fn list_path(&self, disk: &Path) -> Result<PathBuf, StateError> {
        (self.locate)(disk, self.folder.as_deref())
            .map_err(system(disk, "finding the list of its stores"))
    }

    /// Begin the change to `next`. `files` are those that it makes (their
    /// identity is told by [`Keeper::made`]) or gives up. Afterwards files may be
    /// made; no store may miss a write yet that did not miss it before. What `next`
    /// has of volumes that another change touches must be what is recorded.
    pub fn begin(&mut self, next: State, files: Vec<IntentFile>) -> Result<Change, StateError> {
        let lists = self.lists_that_change(&next)?;
        self.last += 1;
        let change = Change {
            number: self.last,
            touched: self.touched(next),
            intent: Intent { lists, files },
            tried: false,
        };
        if let Err(error) = self.note(&change) {
            self.under_way.remove(&change.number);
            return Err(error);
        }
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
        self.note(change)
    }

    /// Have a change come to `next` instead, before it is committed: its first half
    /// has brought to light what the records are to say.
    pub fn amend(&mut self, change: &mut Change, next: State) -> Result<(), StateError> {
        for list in self.lists_that_change(&next)? {
            if !change.intent.lists.contains(&list) {
                change.intent.lists.push(list);
            }
        }
        change.touched = self.touched(next);
        self.note(change)
    }

    /// The state takes effect. When this returns, stores that have left their
    /// lists may miss writes, those that joined must not. If it fails the change
    /// is to be abandoned.
    pub fn commit(&mut self, change: &mut Change) -> Result<(), StateError> {
        change.tried = true;
        let next = self.state_after(change);
        self.write_state(&next)?;
        self.state = next;
        self.settle_lists(&change.intent)
    }

    /// Everything that follows from the commit has happened: delete what was
    /// given up, and forget the intent.
    pub fn finish(&mut self, change: Change) -> Result<(), StateError> {
        let Change { number, intent, .. } = change;
        self.delete_files(&intent)?;
        self.forget(number)
    }

    /// Back to how it was before: lists, state, and files that were made.
    pub fn abandon(&mut self, change: Change) -> Result<(), StateError> {
        let Change {
            number,
            touched,
            intent,
            tried,
        } = change;
        if tried {
            let old = self.state_with(&touched, |touched| touched.old.as_ref());
            self.write_state(&old)?;
            self.state = old;
        }
        self.settle_lists(&intent)?;
        self.delete_files(&intent)?;
        self.forget(number)
    }

    /// Mark a store of `disk` as one that has missed a write (durability.md, rule 6).
    /// False: the list does not name it.
    pub fn mark_lost(&mut self, disk: &Path, cow: &Path) -> Result<bool, StateError> {
        let path = self.list_path(disk)?;
        let _held = self.files.hold(files::folder_of(&path));
        let mut list = Attached::clone(&*self.list_as_written(disk, &path)?);
        let Some(store) = list.stores.iter_mut().find(|store| store.cow == cow) else {
            return Ok(false);
        };
        // While a new store is taking its place, it is the old one that is lost.
        let recorded = self.state.lists();
        let recorded = recorded.get(disk).and_then(|list| list.find(cow));
        if recorded.is_none_or(|store| store.anew.is_none()) {
            store.settle_anew(self.identify(cow)?);
        }
        store.mark = Mark::Lost;
        self.write_list(&path, &list)?;
        Ok(true)
    }

    fn settle(&mut self, intent: &Intent) -> Result<(), StateError> {
        self.settle_lists(intent)?;
        self.delete_files(intent)?;
        self.write_intent()
    }

    /// How `next` differs from what is recorded.
    fn touched(&self, next: State) -> Vec<Touched> {
        let mut touched = Vec::new();
        let mut left = self.state.by_name();
        for volume in next.volumes {
            let old = left.remove(volume.name.as_str());
            if old != Some(&volume) {
                touched.push(Touched {
                    name: volume.name.clone(),
                    old: old.cloned(),
                    next: Some(volume),
                });
            }
        }
        touched.extend(left.into_iter().map(|(name, volume)| Touched {
            name: name.to_owned(),
            old: Some(volume.clone()),
            next: None,
        }));
        touched
    }

    /// The state once a change is committed.
    fn state_after(&self, change: &Change) -> State {
        self.state_with(&change.touched, |touched| touched.next.as_ref())
    }

    /// What is recorded, but of the volumes that are touched one side or the other.
    fn state_with(
        &self,
        touched: &[Touched],
        side: impl Fn(&Touched) -> Option<&VolumeRecord>,
    ) -> State {
        let said = touched.iter().map(|one| (one.name.as_str(), side(one)));
        self.state.with(&said.collect::<Vec<_>>())
    }

    /// A volume that leaves the server leaves its disk's list as it is: the stores
    /// still belong to the disk.
    fn lists_that_change(&self, next: &State) -> Result<Vec<IntentList>, StateError> {
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
                self.state.changed_stores(next, disk, before, list)
            });
            if about.as_ref().is_none_or(|stores| !stores.is_empty()) {
                lists.push(IntentList {
                    disk: disk.to_owned(),
                    list: self.list_path(disk)?,
                    about,
                });
            }
        }
        Ok(lists)
    }

    /// Every list names what it named and what it will name.
    fn join_lists(&mut self, change: &Change) -> Result<(), StateError> {
        let next = self.state_after(change);
        let wanted = next.lists();
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
            let as_written = self.read_list(list)?;
            let now = self.settled_list(Arc::clone(&as_written))?;
            if let Some(about) = about {
                // The others may be in the middle of a change of their own.
                wanted = as_written.without(about).with(&wanted.only(about));
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

    /// Write down what a change is about.
    fn note(&mut self, change: &Change) -> Result<(), StateError> {
        let intent = change.intent.clone();
        self.under_way.insert(change.number, intent);
        self.write_intent()
    }

    /// A change is over.
    fn forget(&mut self, number: u64) -> Result<(), StateError> {
        self.under_way.remove(&number);
        self.write_intent()
    }

    /// One record for all changes that are under way: they are settled by the same
    /// rule. None is no file.
    fn write_intent(&mut self) -> Result<(), StateError> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let path = folder.join(INTENT);
        if self.under_way.is_empty() {
            return files::remove(&mut self.files, &path).map_err(system(&path, "deleting it"));
        }
        let mut all = Intent::default();
        for intent in self.under_way.values() {
            all.lists.extend(intent.lists.iter().cloned());
            all.files.extend(intent.files.iter().cloned());
        }
        let bytes = seal::encode(INTENT, &all);
        files::replace(&mut self.files, &path, &bytes).map_err(system(&path, "writing it"))
    }
}
