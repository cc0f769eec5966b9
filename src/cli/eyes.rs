//! Whether another user could read a file: what `check`, run by root, has to know about the service's user. It looks at
//! owners and modes; access lists beyond them are not considered.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A user of this machine.
pub struct Eyes {
    name: String,
    uid: u32,
    groups: Vec<u32>,
}

/// Whether this process may read everything.
pub fn we_are_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

impl Eyes {
    /// The user of this name, with its groups; `None` when this machine has none.
    pub fn of(name: &str) -> Option<Eyes> {
        let passwd = std::fs::read_to_string("/etc/passwd").ok()?;
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        let uid = fields.next()?.parse().ok()?;
        let mut groups = vec![fields.next()?.parse().ok()?];
        for line in std::fs::read_to_string("/etc/group").unwrap_or_default().lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [_, _, gid, members] = fields[..]
                && members.split(',').any(|member| member == name)
            {
                groups.extend(gid.parse::<u32>());
            }
        }
        Some(Eyes { name: name.to_owned(), uid, groups })
    }

    /// Whether the user can read a file.
    ///
    /// # Errors
    /// A sentence that names the file or the directory in the way.
    pub fn read(&self, file: &Path) -> Result<(), String> {
        self.reach(file, 4, "be read")
    }

    /// Whether the user can see which files a directory has.
    ///
    /// # Errors
    /// A sentence that names the directory, or the one in the way.
    pub fn list(&self, directory: &Path) -> Result<(), String> {
        self.reach(directory, 5, "be listed")
    }

    /// Whether the user can make files where this one stands, or write to it when it is there.
    ///
    /// # Errors
    /// A sentence that names the file or the directory in the way.
    pub fn write(&self, file: &Path) -> Result<(), String> {
        let directory = file.parent().unwrap_or(Path::new("/"));
        if file.exists() { self.reach(file, 2, "be written") } else { self.reach(directory, 3, "take a new file") }
    }

    fn reach(&self, path: &Path, wanted: u32, what: &str) -> Result<(), String> {
        // Links are followed, and each directory on the way to the file itself must let the user pass.
        let lost = |error| format!("{} cannot be found: {error}", path.display());
        let given = std::path::absolute(path).map_err(lost)?;
        let real = path.canonicalize().map_err(lost)?;
        // The way as it is written, and the way that it leads to where there are links.
        for way in [&given, &real] {
            let mut above: Vec<&Path> = way.ancestors().skip(1).collect();
            above.reverse();
            for directory in above {
                self.may(directory, 1, &format!("let user {} reach {}", self.name, path.display()))?;
            }
        }
        self.may(&real, wanted, &format!("{what} by user {}", self.name))
    }

    fn may(&self, path: &Path, wanted: u32, what: &str) -> Result<(), String> {
        let metadata = std::fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mode = metadata.mode();
        let bits = match metadata.uid() {
            _ if self.uid == 0 => 7,
            owner if owner == self.uid => mode >> 6,
            _ if self.groups.contains(&metadata.gid()) => mode >> 3,
            _ => mode,
        } & 7;
        if bits & wanted == wanted {
            return Ok(());
        }
        Err(format!(
            "{} cannot {what}: its mode is {:04o}, its owner {}:{}",
            path.display(),
            mode & 0o7777,
            metadata.uid(),
            metadata.gid()
        ))
    }
}
