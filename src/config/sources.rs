//! The files that make up one configuration, and those that it names: finding them, reading them within bounds, and
//! telling a mistake with the right file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use glob::Pattern;
use xxhash_rust::xxh3::xxh3_128;

use super::Pem;
use super::scan::{Index, Problem};

/// Most files of one configuration.
const MOST_FILES: usize = 256;
/// Largest accepted file that a configuration names besides its parts, such as a list of authorities.
const MOST_SIDE: usize = 1 << 20;

/// One file of a configuration.
#[derive(Debug)]
pub struct Source {
    /// `None` for the main file.
    pub name: Option<Arc<Path>>,
    /// Where its values stand.
    pub index: Index,
}

/// All files of a configuration; the main file is the first.
#[derive(Debug)]
pub struct Sources {
    /// The main file on the disk; `None` when only its text is judged.
    main: Option<PathBuf>,
    list: Vec<Source>,
    pems: Vec<(PathBuf, Pem)>,
    listed: Vec<PathBuf>,
}

impl Sources {
    /// A configuration of one file so far.
    pub fn new(main: Option<&Path>, index: Index) -> Sources {
        let list = vec![Source { name: None, index }];
        Sources { main: main.map(Path::to_owned), list, pems: Vec::new(), listed: Vec::new() }
    }

    /// Adds an included file and returns its number.
    pub fn add(&mut self, name: Arc<Path>, index: Index) -> usize {
        self.list.push(Source { name: Some(name), index });
        self.list.len() - 1
    }

    /// Whether another file may be added.
    pub fn has_room(&self) -> bool {
        self.list.len() < MOST_FILES
    }

    /// Whether a file is one of them already.
    pub fn contains(&self, file: &Path) -> bool {
        self.list.iter().any(|source| source.name.as_deref() == Some(file))
    }

    /// A problem at `path` of one of the files.
    pub fn problem(&self, source: usize, path: &str, message: impl Into<String>) -> Problem {
        let of = &self.list[source.min(self.list.len() - 1)];
        Problem { file: of.name.clone(), ..of.index.problem(path, message) }
    }

    /// A place in one file, said in another: with the file's name when it is not the same.
    pub fn place(&self, of: usize, path: &str, seen_from: usize) -> String {
        match &self.list[of.min(self.list.len() - 1)].name {
            _ if of == seen_from => path.to_owned(),
            Some(name) => format!("{path} of {}", name.display()),
            None => format!("{path} of the main file"),
        }
    }

    /// The files of a pattern in the main file, by name; relative to the directory of the main file. A name without a
    /// wildcard must exist, a pattern may match nothing; names that begin with a dot are left out.
    ///
    /// # Errors
    /// A sentence.
    pub fn expand(&mut self, pattern: &str) -> Result<Vec<PathBuf>, String> {
        let Some(directory) = self.directory(0) else {
            return Err("files can be included only by a file on a disk".into());
        };
        let whole = directory.join(pattern);
        let wild = |part: &str| part.contains(['*', '?', '[']);
        if !wild(pattern) {
            return Ok(vec![whole]);
        }
        let (parent, name) = pattern.rsplit_once('/').unwrap_or(("", pattern));
        if wild(parent) {
            return Err(format!("{pattern:?}: only the last part of a pattern may have wildcards"));
        }
        let name = Pattern::new(name).map_err(|error| format!("{pattern:?} is no pattern: {}", error.msg))?;
        let parent = whole.parent().unwrap_or(&directory).to_owned();
        let entries = match std::fs::read_dir(&parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(format!("{} cannot be listed: {error}", parent.display())),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| format!("{} cannot be listed: {error}", parent.display()))?;
            let found = entry.file_name();
            let file = entry.path();
            let matches = found.to_str().is_some_and(|found| !found.starts_with('.') && name.matches(found));
            if matches && self.main.as_ref() != Some(&file) {
                files.push(file);
            }
            if files.len() > MOST_FILES {
                return Err(format!("{pattern:?} matches more than {MOST_FILES} files"));
            }
        }
        files.sort();
        self.listed.push(parent);
        Ok(files)
    }

    /// Reads a PEM file that a configuration names, once for all who name it; a relative name counts from the directory
    /// of the file that names it.
    ///
    /// # Errors
    /// A sentence.
    pub fn read_pem(&mut self, source: usize, name: &str) -> Result<Pem, String> {
        let Some(directory) = self.directory(source) else {
            return Err("files can be named only by a file on a disk".into());
        };
        let path = directory.join(name);
        if let Some((_, pem)) = self.pems.iter().find(|(known, _)| *known == path) {
            return Ok(pem.clone());
        }
        let bytes = read(&path, MOST_SIDE).map_err(|error| format!("{} {error}", path.display()))?;
        if bytes.len() > MOST_SIDE {
            return Err(format!("{} is larger than {MOST_SIDE} bytes", path.display()));
        }
        let pem = Pem { file: path.display().to_string(), digest: xxh3_128(&bytes), bytes: bytes.into() };
        self.pems.push((path, pem.clone()));
        Ok(pem)
    }

    /// Digests of what the configuration names besides its own files.
    pub fn digests(&self) -> impl Iterator<Item = u128> + '_ {
        self.pems.iter().map(|(_, pem)| pem.digest)
    }

    /// All files that the configuration needs: its own, and those that it names.
    pub fn files(&self) -> Vec<PathBuf> {
        let own = self.list.iter().filter_map(|source| source.name.as_deref());
        let named = self.pems.iter().map(|(path, _)| path.clone());
        self.main.iter().cloned().chain(own.map(Path::to_owned)).chain(named).collect()
    }

    /// All directories in which files were looked for.
    pub fn listed(&self) -> Vec<PathBuf> {
        self.listed.clone()
    }

    fn directory(&self, source: usize) -> Option<PathBuf> {
        let main = self.main.as_deref()?;
        let file = self.list.get(source).and_then(|source| source.name.as_deref()).unwrap_or(main);
        Some(file.parent().unwrap_or(Path::new("")).to_owned())
    }
}

/// Reads a regular file of at most `most` bytes, and one byte more when it is longer. A directory, a pipe or a device
/// is refused before anything is read from it, because reading them can wait for ever.
///
/// # Errors
/// What is wrong, to stand behind the name.
pub fn read(path: &Path, most: usize) -> Result<Vec<u8>, String> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| format!("cannot be opened: {error}"))?;
    let metadata = file.metadata().map_err(|error| format!("cannot be examined: {error}"))?;
    if !metadata.is_file() {
        return Err("is not a regular file".into());
    }
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
    Ok(bytes)
}
