//! Leads every change of what a server has through the steps of the module's
//! page, and settles at a start what a crash interrupted.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::attached::{Attached, Mark};
use super::files::{self, FileIdentity, Files};
use super::folder::StateFolder;
use super::place;
use super::record::{Intent, IntentFile, IntentList, State, VolumeRecord};
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
    /// The volumes that it touches, by name: before and after.
    touched: BTreeMap<String, Touched>,
    intent: Intent,
    /// Whether the state may have been replaced.
    tried: bool,
}

/// What a change does to a volume's record.
#[derive(Clone, Debug)]
struct Touched {
    old: Option<VolumeRecord>,
    next: Option<VolumeRecord>,
}

impl Change {
    /// The name under which the file that belongs at `path` is to be made, with
    /// the identity that it keeps when it is renamed.
    pub fn made_as(&self, path: &Path) -> Option<PathBuf> {
        let mut files = self.intent.files.iter();
        files.find(|file| file.path == path)?.made_as()
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
    pub fn list(&self, disk: &Path) -> Result<Attached, StateError> {
        self.settled_list(&self.list_path(disk)?)
    }

    fn settled_list(&self, path: &Path) -> Result<Attached, StateError> {
        let mut list = self.read_list(path)?;
        for store in list.stores.iter_mut().filter(|one| one.anew.is_some()) {
            store.settle_anew(self.identify(&store.cow)?);
        }
        Ok(list)
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

    /// The file that belongs at `path` was made under its first name
    /// ([`Change::made_as`]): from here on a crash takes it away again wherever it
    /// is, and it may be given its own name.
    pub fn made(&mut self, change: &mut Change, path: &Path) -> Result<(), StateError> {
        for file in &mut change.intent.files {
            if file.path == path
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
            let old = self.state_with(&touched, |touched| &touched.old);
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
        let mut list = self.read_list(&path)?;
        let Some(store) = list.stores.iter_mut().find(|store| store.cow == cow) else {
            return Ok(false);
        };
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
    fn touched(&self, next: State) -> BTreeMap<String, Touched> {
        let mut touched = BTreeMap::new();
        let mut left = self.state.by_name();
        for volume in next.volumes {
            let old = left.remove(volume.name.as_str());
            if old != Some(&volume) {
                let (name, old) = (volume.name.clone(), old.cloned());
                let next = Some(volume);
                touched.insert(name, Touched { old, next });
            }
        }
        for (name, volume) in left {
            let (old, next) = (Some(volume.clone()), None);
            touched.insert(name.to_owned(), Touched { old, next });
        }
        touched
    }

    /// The state once a change is committed.
    fn state_after(&self, change: &Change) -> State {
        self.state_with(&change.touched, |touched| &touched.next)
    }

    /// What is recorded, but of the volumes that are touched one side or the other.
    fn state_with(
        &self,
        touched: &BTreeMap<String, Touched>,
        side: impl Fn(&Touched) -> &Option<VolumeRecord>,
    ) -> State {
        let mut state = self.state.clone();
        for (name, touched) in touched {
            state.put(name, side(touched).clone());
        }
        state
    }

    /// A volume that leaves the server leaves its disk's list as it is: the stores
    /// still belong to the disk.
    fn lists_that_change(&self, next: &State) -> Result<Vec<IntentList>, StateError> {
        let mut lists = Vec::new();
        let before = self.state.lists();
        for (&disk, list) in &next.lists() {
            if before.get(disk) != Some(list) {
                lists.push(IntentList {
                    disk: disk.to_owned(),
                    list: self.list_path(disk)?,
                });
            }
        }
        Ok(lists)
    }

    /// Every list names what it named and what it will name.
    fn join_lists(&mut self, change: &Change) -> Result<(), StateError> {
        let next = self.state_after(change);
        let wanted = next.lists();
        for IntentList { disk, list } in &change.intent.lists {
            let now = self.read_list(list)?;
            let both = match wanted.get(disk.as_path()) {
                Some(wanted) => now.with(wanted),
                None => now,
            };
            self.write_list(list, &both)?;
        }
        Ok(())
    }

    /// Every list says what the state says; a store that is lost stays lost.
    fn settle_lists(&mut self, intent: &Intent) -> Result<(), StateError> {
        for IntentList { disk, list } in &intent.lists {
            let now = self.settled_list(list)?;
            let mut lists = self.state.lists();
            let mut wanted = lists.remove(disk.as_path()).unwrap_or_default();
            for store in &mut wanted.stores {
                if now.find(&store.cow).is_some_and(|s| s.mark == Mark::Lost) {
                    store.mark = Mark::Lost;
                }
            }
            self.write_list(list, &wanted)?;
        }
        Ok(())
    }

    /// Delete the files of an intent that no snapshot of the state names, as far
    /// as they are the ones that were meant.
    fn delete_files(&mut self, intent: &Intent) -> Result<(), StateError> {
        for file in &intent.files {
            if let Some(made_as) = file.made_as()
                && self.identify(&made_as)?.is_some()
            {
                self.delete(&made_as)?;
            }
            let is_named = self.state.cows().contains(file.path.as_path());
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

    fn read_list(&self, path: &Path) -> Result<Attached, StateError> {
        let advice = "; if you are sure of the disk's stores, move it away";
        Ok(self.read(path, ATTACHED, advice)?.unwrap_or_default())
    }

    /// An empty list is no file.
    fn write_list(&mut self, path: &Path, list: &Attached) -> Result<(), StateError> {
        if self.read_list(path)? == *list {
            return Ok(());
        }
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
