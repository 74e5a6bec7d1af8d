// Conversations and their pictures, kept in this browser and nowhere else.
//
// A chat is `{id, created, updated, messages}`; a message refers to its pictures by id, and a picture is
// `{id, chat, name, blob}`. What is kept is bounded: the chats that were left alone longest go first.

const MAX_CHATS = 200;
const MAX_PICTURE_BYTES = 256 * 1024 * 1024;

/** The store; one that forgets everything with the page where the browser keeps nothing. */
export async function openStore() {
  try {
    const request = indexedDB.open("gemcut", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats", { keyPath: "id" });
      request.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("chat", "chat");
    };
    return new Store(new Database(await done(request)));
  } catch {
    return new Store(new Memory());
  }
}

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

class Database {
  lasts = true;

  constructor(database) {
    this.database = database;
  }

  table(name, mode = "readonly") {
    return this.database.transaction(name, mode).objectStore(name);
  }

  all(name) {
    return done(this.table(name).getAll());
  }

  get(name, id) {
    return done(this.table(name).get(id));
  }

  put(name, value) {
    return done(this.table(name, "readwrite").put(value));
  }

  delete(name, id) {
    return done(this.table(name, "readwrite").delete(id));
  }

  picturesOf(chat) {
    return done(this.table("pictures").index("chat").getAll(chat));
  }
}

class Memory {
  lasts = false;
  tables = { chats: new Map(), pictures: new Map() };

  async all(name) {
    return structuredClone([...this.tables[name].values()]);
  }

  async get(name, id) {
    return structuredClone(this.tables[name].get(id));
  }

  async put(name, value) {
    this.tables[name].set(value.id, structuredClone(value));
  }

  async delete(name, id) {
    this.tables[name].delete(id);
  }

  async picturesOf(chat) {
    return [...this.tables.pictures.values()].filter((picture) => picture.chat === chat);
  }
}

class Store {
  constructor(database) {
    this.database = database;
    this.lasts = database.lasts; // beyond this page's life
  }

  /** All chats, the latest first. */
  async chats() {
    return (await this.database.all("chats")).sort((a, b) => b.updated - a.updated);
  }

  chat(id) {
    return this.database.get("chats", id);
  }

  picture(id) {
    return this.database.get("pictures", id);
  }

  /** Keep a chat as it is now. */
  async save(chat) {
    await this.database.put("chats", chat);
  }

  async savePicture(picture) {
    await this.database.put("pictures", picture);
  }

  /** Delete a chat. Resolves to what `restore` needs to bring it back. */
  async remove(id) {
    const chat = await this.chat(id);
    const pictures = await this.database.picturesOf(id);
    await this.database.delete("chats", id);
    for (const picture of pictures) await this.database.delete("pictures", picture.id);
    return { chat, pictures };
  }

  async restore({ chat, pictures }) {
    for (const picture of pictures) await this.database.put("pictures", picture);
    await this.database.put("chats", chat);
  }

  async removeAll() {
    for (const chat of await this.chats()) await this.remove(chat.id);
  }

  /** `{chats, bytes}`: how many there are, and the size of their pictures. */
  async size() {
    const [chats, pictures] = [await this.database.all("chats"), await this.database.all("pictures")];
    return { chats: chats.length, bytes: pictures.reduce((sum, picture) => sum + picture.blob.size, 0) };
  }

  /** Delete what is too much, but for one chat. Resolves to how many had to go. */
  async trim(keep) {
    const chats = await this.chats();
    let { bytes } = await this.size();
    let gone = 0;
    while (chats.length > 1 && (chats.length > MAX_CHATS || bytes > MAX_PICTURE_BYTES)) {
      const oldest = chats.pop();
      if (oldest.id === keep) continue;
      const { pictures } = await this.remove(oldest.id);
      bytes -= pictures.reduce((sum, picture) => sum + picture.blob.size, 0);
      gone++;
    }
    return gone;
  }
}
