//! Users and groups out of `/etc/passwd` and `/etc/group`. A static binary has no NSS to ask.

/// As whom a program runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All groups, the first included.
    pub groups: Vec<u32>,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Its home directory.
    pub home: String,
    /// Its shell.
    pub shell: String,
}

impl Account {
    /// The agent's own, as the guest's files have it.
    pub fn of_agent() -> Self {
        let uid = rustix::process::geteuid().as_raw();
        let (passwd, group) = files();
        let of_files = resolve(&uid.to_string(), &passwd, &group).ok().filter(|account| account.uid == uid);
        of_files.unwrap_or_else(|| Account {
            uid,
            gid: rustix::process::getegid().as_raw(),
            groups: Vec::new(),
            name: None,
            home: "/".to_owned(),
            shell: "/bin/sh".to_owned(),
        })
    }

    /// The account that `who` names in the guest's files.
    pub fn named(who: &str) -> Result<Self, UnknownAccount> {
        let (passwd, group) = files();
        resolve(who, &passwd, &group)
    }
}

/// The guest's files; empty where there are none.
fn files() -> (String, String) {
    let read = |path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    (read("/etc/passwd"), read("/etc/group"))
}

/// Why there is no such account.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownAccount {
    /// No user of that name.
    #[error("there is no user `{0}`")]
    User(String),
    /// No group of that name.
    #[error("there is no group `{0}`")]
    Group(String),
}

/// A line of `/etc/passwd`.
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

fn entries(passwd: &str) -> impl Iterator<Item = Entry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let (_comment, home, shell) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Entry { name, uid, gid, home, shell })
    })
}

/// Name, id and members of each group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, impl Iterator<Item = &str>)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, gid) = (fields.next()?, fields.next()?, fields.next()?.parse().ok()?);
        Some((name, gid, fields.next()?.split(',')))
    })
}

/// The account that `who` names: `name`, `uid`, `name:group` or `uid:gid`. A number needs no entry; it then is in its
/// own group of the same number, unless one is named. A group that is named is the only one.
pub fn resolve(who: &str, passwd: &str, group: &str) -> Result<Account, UnknownAccount> {
    let (user, named_group) = who.split_once(':').map_or((who, None), |(user, group)| (user, Some(group)));
    let number = user.parse::<u32>().ok().filter(|n| *n != u32::MAX);
    let entry = entries(passwd)
        .find(|entry| entry.name == user)
        .or_else(|| entries(passwd).find(|entry| number == Some(entry.uid)));
    let (uid, own_gid) = match (&entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Some(number)) => (number, number),
        (None, None) => return Err(UnknownAccount::User(user.to_owned())),
    };
    let (gid, groups) = match named_group {
        Some(named) => {
            let gid = resolve_group(named, group)?;
            (gid, vec![gid])
        }
        None => (own_gid, groups_of(entry.as_ref().map(|entry| entry.name), own_gid, group)),
    };
    let or = |field: Option<&str>, default: &str| field.filter(|f| !f.is_empty()).unwrap_or(default).to_owned();
    Ok(Account {
        uid,
        gid,
        groups,
        name: entry.as_ref().map(|entry| entry.name.to_owned()),
        home: or(entry.as_ref().map(|entry| entry.home), "/"),
        shell: or(entry.as_ref().map(|entry| entry.shell), "/bin/sh"),
    })
}

fn resolve_group(named: &str, group: &str) -> Result<u32, UnknownAccount> {
    let number = named.parse::<u32>().ok().filter(|n| *n != u32::MAX);
    let by_name = groups(group).find(|(name, ..)| *name == named).map(|(_, gid, _)| gid);
    by_name.or(number).ok_or_else(|| UnknownAccount::Group(named.to_owned()))
}

fn groups_of(name: Option<&str>, gid: u32, group: &str) -> Vec<u32> {
    let mut all = vec![gid];
    if let Some(name) = name {
        for (_, other, mut members) in groups(group) {
            if members.any(|member| member == name) && !all.contains(&other) {
                all.push(other);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken line\nalice:x:1000:100::/home/alice:\n\
                          1001:x:7:7:a name of digits:/:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\ndisk:x:6:bob,alice\nkvm:x:44:alice\nbroken\n";

    #[test]
    fn names_and_numbers_are_found() {
        let alice = resolve("alice", PASSWD, GROUP).unwrap();
        assert_eq!((alice.uid, alice.gid, &alice.groups[..]), (1000, 100, &[100, 6, 44][..]));
        assert_eq!((&alice.home[..], &alice.shell[..]), ("/home/alice", "/bin/sh"));
        assert_eq!(resolve("1000", PASSWD, GROUP).unwrap(), alice);
        assert_eq!(resolve("1001", PASSWD, GROUP).unwrap().uid, 7, "a name goes before a number");
    }

    #[test]
    fn a_named_group_is_the_only_one() {
        let alice = resolve("alice:disk", PASSWD, GROUP).unwrap();
        assert_eq!((alice.gid, alice.groups), (6, vec![6]));
        assert_eq!(resolve("5:9", PASSWD, GROUP).unwrap().gid, 9);
        assert_eq!(resolve("alice:none", PASSWD, GROUP), Err(UnknownAccount::Group("none".into())));
    }

    #[test]
    fn a_number_needs_no_entry() {
        let account = resolve("4711", PASSWD, GROUP).unwrap();
        assert_eq!((account.uid, account.gid, account.groups), (4711, 4711, vec![4711]));
        assert_eq!((account.name, &account.home[..]), (None, "/"));
    }

    #[test]
    fn unknown_users_are_refused() {
        for who in ["", "mallory", "-1", "4294967295", "99999999999", ":0", "broken line"] {
            assert!(matches!(resolve(who, PASSWD, GROUP), Err(UnknownAccount::User(_))), "{who}");
        }
    }

    proptest! {
        #[test]
        fn no_files_make_it_panic(who in "\\PC{0,12}", passwd in "[a-z0-9:,\n]{0,120}", group in "[a-z0-9:,\n]{0,120}") {
            let _ = resolve(&who, &passwd, &group);
        }
    }
}
